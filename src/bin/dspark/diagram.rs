//! Reliability diagrams as SVG and PNG, without any font of the system: SVG leaves text to its viewer, and the PNG's
//! letters are drawn from an 8x8 bitmap font.

use std::path::Path;

use anyhow::{Result, anyhow};
use dspark::schedule::metrics::Bin;
use font8x8::UnicodeFonts as _;
use plotters::coord::Shift;
use plotters::prelude::*;

/// Pixels of one panel, and of its plot inside.
const PANEL: (i32, i32) = (220, 240);
const PLOT: i32 = 180;
const MARGIN: (i32, i32) = (24, 36);

const BEFORE: RGBColor = RGBColor(160, 160, 160);
const AFTER: RGBColor = RGBColor(20, 100, 200);

/// One position: its heading, and the bins before and after calibration.
pub struct Panel {
    pub heading: String,
    pub before: Vec<Bin>,
    pub after: Vec<Bin>,
}

/// Writes `stem.svg` and `stem.png`.
pub fn write(stem: &Path, panels: &[Panel]) -> Result<()> {
    let size = (
        (PANEL.0 * panels.len().max(1) as i32) as u32,
        (PANEL.1 + 24) as u32,
    );
    let svg = stem.with_extension("svg");
    let area = SVGBackend::new(&svg, size).into_drawing_area();
    draw(&area, panels, &|area, text, at| {
        area.draw(&Text::new(text.to_owned(), at, ("sans-serif", 12)))
            .map_err(|error| anyhow!("{error}"))
    })?;
    let png = stem.with_extension("png");
    let area = BitMapBackend::new(&png, size).into_drawing_area();
    draw(&area, panels, &bitmap_text)
}

type Label<'a, DB> = &'a dyn Fn(&DrawingArea<DB, Shift>, &str, (i32, i32)) -> Result<()>;

fn draw<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    panels: &[Panel],
    label: Label<'_, DB>,
) -> Result<()> {
    let failed = |error: DrawingAreaErrorKind<DB::ErrorType>| anyhow!("{error}");
    area.fill(&WHITE).map_err(failed)?;
    for (i, panel) in panels.iter().enumerate() {
        let origin = (i as i32 * PANEL.0 + MARGIN.0, MARGIN.1 + PLOT);
        let at = |x: f64, y: f64| {
            let pixels = |v: f64| (v * f64::from(PLOT)).round() as i32;
            (origin.0 + pixels(x), origin.1 - pixels(y))
        };
        let frame = [at(0.0, 0.0), at(1.0, 1.0)];
        area.draw(&Rectangle::new(frame, BLACK)).map_err(failed)?;
        area.draw(&PathElement::new(frame, BEFORE))
            .map_err(failed)?;
        for (bins, colour) in [(&panel.before, BEFORE), (&panel.after, AFTER)] {
            let most = bins.iter().map(|bin| bin.count).fold(1.0, f64::max);
            for bin in bins.iter().filter(|bin| bin.count > 0.0) {
                let radius = 2 + (5.0 * (bin.count / most).sqrt()).round() as i32;
                let place = at(bin.predicted, bin.observed);
                area.draw(&Circle::new(place, radius, colour.filled()))
                    .map_err(failed)?;
            }
        }
        label(area, &panel.heading, (origin.0, 10))?;
    }
    let legend =
        "across: predicted survival, up: accepted share; grey before, blue after; area by count";
    label(area, legend, (MARGIN.0, PANEL.1))?;
    area.present().map_err(failed)
}

/// Text of 8x8 letters, top left at `at`; letters the font lacks are left out.
fn bitmap_text<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    text: &str,
    at: (i32, i32),
) -> Result<()> {
    for (i, letter) in text.chars().enumerate() {
        let Some(rows) = font8x8::BASIC_FONTS.get(letter) else {
            continue;
        };
        for (y, row) in rows.into_iter().enumerate() {
            for x in (0..8).filter(|x| row >> x & 1 == 1) {
                let place = (at.0 + 7 * i as i32 + x, at.1 + y as i32);
                area.draw_pixel(place, &BLACK)
                    .map_err(|error| anyhow!("{error}"))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let bin = Bin {
            count: 3.0,
            predicted: 0.4,
            observed: 0.6,
        };
        let panel = Panel {
            heading: "1: ECE 2.0 -> 1.0 %".into(),
            before: vec![bin],
            after: vec![bin; 2],
        };
        write(&dir.path().join("d"), &[panel]).unwrap();
        let svg = std::fs::read_to_string(dir.path().join("d.svg")).unwrap();
        assert!(svg.contains("ECE 2.0") && svg.matches("<circle").count() == 3);
        let png = std::fs::read(dir.path().join("d.png")).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 500);
    }
}
