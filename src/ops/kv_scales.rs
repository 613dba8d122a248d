//! Caches of eight bits: how they are asked for, and the factors of their keys and values.

use std::fmt;
use std::str::FromStr;

use super::KvGeometry;
use crate::error::{Error, Result};

/// How a target's cache holds keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// As the backend holds activations.
    #[default]
    Native,
    /// In e4m3 ([`super::e4m3`]), with a fixed factor for each layer and head: half of bf16's memory and traffic.
    Fp8,
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for KvDtype {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "fp8" => Ok(Self::Fp8),
            _ => Err("expected native or fp8".to_owned()),
        }
    }
}

/// Factors of a cache in e4m3: a key k of a layer and head is held as the number nearest to `k / factor`, and stands for
/// `factor` times that number. They do not change while the cache is in use, so that what a slot holds depends on its
/// token alone.
#[derive(Clone, Debug, PartialEq)]
pub struct KvScales {
    num_kv_heads: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvScales {
    /// Factors `[num_layers, num_kv_heads]` of keys and of values.
    ///
    /// # Errors
    /// Another number of them than `geometry` has layers and heads; a factor that is not a normal number above 0.
    pub fn new(geometry: &KvGeometry, keys: Vec<f32>, values: Vec<f32>) -> Result<Self> {
        let expected = geometry.num_layers * geometry.num_kv_heads;
        for (field, scales) in [("k_scale", &keys), ("v_scale", &values)] {
            if scales.len() != expected {
                let expected = format!("one for each of {expected} layers' heads");
                return Err(Error::argument(field, expected, scales.len()));
            }
            if let Some(scale) = scales.iter().find(|&&scale| !Self::is_scale(scale)) {
                return Err(Error::argument(field, "a normal number above 0", scale));
            }
        }
        Ok(Self {
            num_kv_heads: geometry.num_kv_heads,
            keys,
            values,
        })
    }

    /// Whether a factor can be divided by.
    pub(crate) fn is_scale(scale: f32) -> bool {
        scale > 0.0 && scale.is_normal()
    }

    /// Refuses factors of a cache of another shape.
    pub(crate) fn check(&self, geometry: &KvGeometry) -> Result<()> {
        let found = (self.num_layers(), self.num_kv_heads);
        if found == (geometry.num_layers, geometry.num_kv_heads) {
            return Ok(());
        }
        let expected = format!(
            "{} layers of {} heads",
            geometry.num_layers, geometry.num_kv_heads
        );
        let found = format!("{} of {}", found.0, found.1);
        Err(Error::argument("scales", expected, found))
    }

    fn num_layers(&self) -> usize {
        self.keys.len().checked_div(self.num_kv_heads).unwrap_or(0)
    }

    /// Factors of a layer's keys and of its values, `[num_kv_heads]` each.
    pub fn of_layer(&self, layer: usize) -> (&[f32], &[f32]) {
        let heads = layer * self.num_kv_heads..(layer + 1) * self.num_kv_heads;
        (&self.keys[heads.clone()], &self.values[heads])
    }

    /// Factors of all layers' keys, then of all layers' values.
    #[cfg(feature = "cuda")]
    pub(crate) fn all(&self) -> Vec<f32> {
        [&*self.keys, &self.values].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: KvGeometry = KvGeometry {
        num_layers: 2,
        num_pages: 1,
        page_size: 1,
        num_kv_heads: 3,
        head_dim: 2,
    };

    #[test]
    fn factors_are_numbers_that_can_be_divided_by() {
        let good = vec![0.5; 6];
        assert!(KvScales::new(&GEOMETRY, good.clone(), good.clone()).is_ok());
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
            let mut scales = good.clone();
            scales[4] = bad;
            let keys = KvScales::new(&GEOMETRY, scales.clone(), good.clone());
            assert!(keys.unwrap_err().to_string().contains("k_scale"), "{bad}");
            let values = KvScales::new(&GEOMETRY, good.clone(), scales);
            assert!(values.unwrap_err().to_string().contains("v_scale"), "{bad}");
        }
        assert!(KvScales::new(&GEOMETRY, good[1..].to_vec(), good.clone()).is_err());
    }

    #[test]
    fn every_layer_has_its_own_factors() {
        let numbers = |start: f32| (0..6).map(|i| start + i as f32).collect::<Vec<_>>();
        let scales = KvScales::new(&GEOMETRY, numbers(1.0), numbers(7.0)).unwrap();
        let (keys, values) = scales.of_layer(1);
        assert_eq!(
            (keys, values),
            (&[4.0, 5.0, 6.0][..], &[10.0, 11.0, 12.0][..])
        );
        let other = KvGeometry {
            num_layers: 3,
            num_kv_heads: 2,
            ..GEOMETRY
        };
        assert!(scales.check(&GEOMETRY).is_ok() && scales.check(&other).is_err());
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for dtype in [KvDtype::Native, KvDtype::Fp8] {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        assert!("e5m2".parse::<KvDtype>().is_err());
    }
}
