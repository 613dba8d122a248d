//! Stop strings in streamed text.

/// Finds stop strings in text that comes in pieces, holding back what may be the beginning of one.
#[derive(Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Looks for any of `stops`, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        let held = String::new();
        Self { stops, held }
    }

    /// Takes more text. Returns the text that may be shown now, and whether a stop string was completed: then the text
    /// ends before it and nothing is held any more.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s)).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| self.overlap(stop)).max();
        let tail = self.held.split_off(self.held.len() - keep.unwrap_or(0));
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// What was held back, at the end of the output.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of the held text that `stop` begins with.
    fn overlap(&self, stop: &str) -> usize {
        let ends = stop.char_indices().map(|(at, _)| at).rev();
        ends.take_while(|&at| at > 0)
            .find(|&at| self.held.ends_with(&stop[..at]))
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes `text` in pieces of `step` characters.
    fn run(stops: &[&str], text: &str, step: usize) -> (String, bool) {
        let mut filter = StopStrings::new(stops.iter().map(ToString::to_string).collect());
        let mut shown = String::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(step) {
            let (text, stopped) = filter.push(&String::from_iter(piece));
            shown += &text;
            if stopped {
                return (shown, true);
            }
        }
        (shown + &filter.finish(), false)
    }

    #[test]
    fn text_is_cut_before_a_stop_string_however_it_comes() {
        for step in 1..8 {
            let found = |text: &str| (text.to_string(), true);
            assert_eq!(run(&["END"], "one ENEND two", step), found("one EN"));
            assert_eq!(run(&["\n\n", "q"], "a\nb\n\nc", step), found("a\nb"));
            assert_eq!(run(&["日本"], "日日本", step), found("日"));
            assert_eq!(run(&["END"], "no EN", step), ("no EN".into(), false));
            assert_eq!(run(&[], "all", step), ("all".into(), false));
        }
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let mut filter = StopStrings::new(vec!["abc".into()]);
        assert_eq!(filter.push("xab"), ("x".into(), false));
        assert_eq!(filter.push("ab"), ("ab".into(), false));
        assert_eq!(filter.push("d"), ("abd".into(), false));
    }
}
