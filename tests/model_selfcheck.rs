//! The self-check names the slip a mislabelled checkpoint has.

mod model_support;

use dspark::model::selfcheck::{SelfCheck, Slip, self_check};
use dspark::model::{DSparkDrafter, DecoderTarget, DrafterConfig};
use model_support::*;
use serde_json::{Value, json};

fn check(drafter: &str, tap_ids: Option<Value>) -> SelfCheck {
    let (golden, mut ops) = (Golden::read(&drafter_dir(drafter)), reference());
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(drafter_dir(drafter).join(file), dir.path().join(file)).unwrap();
    }
    if let Some(tap_ids) = tap_ids {
        let file = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config["target_layer_ids"] = tap_ids;
        std::fs::write(file, config.to_string()).unwrap();
    }
    let config = DrafterConfig::read(dir.path()).unwrap();
    let target = target_dir(golden.json["target"].as_str().unwrap());
    let target = DecoderTarget::load(&mut ops, &target, &limits(), config.tap_ids());
    let mut target = target.unwrap();
    let mut drafter = DSparkDrafter::load(&mut ops, &target, dir.path(), &limits()).unwrap();
    let prompt = ids(&golden.list("cases")[1]["prompt_ids"]);
    self_check(&mut ops, &mut target, &mut drafter, &limits(), &prompt, 24).unwrap()
}

#[test]
fn sound_pairs_have_no_slip() {
    for name in DRAFTERS {
        let report = check(name, None);
        eprintln!("{name}: {report:?}");
        assert_eq!(report.suspect(), None, "{name}: {report:?}");
        assert!(report.straight > 0.0, "{name}: {report:?}");
    }
}

#[test]
fn shifted_taps_are_named() {
    for (name, taps, slip) in [
        ("qwen3_vanilla", json!([-1, 0, 1]), Slip::TapsLater),
        ("qwen3_rnn", json!([0, 1]), Slip::TapsLater),
    ] {
        let report = check(name, Some(taps));
        eprintln!("{name}: {report:?}");
        assert_eq!(report.suspect(), Some(slip), "{name}: {report:?}");
    }
}

#[test]
fn only_a_clear_gain_is_a_suspect() {
    let report = |straight, slip| SelfCheck {
        straight,
        slips: vec![(Slip::AnchorDrop, 0.0), (Slip::PositionsLater, slip)],
    };
    assert_eq!(report(0.0, 1.0).suspect(), Some(Slip::PositionsLater));
    assert_eq!(report(0.0, 0.1).suspect(), None);
    assert_eq!(report(2.0, 2.5).suspect(), None);
    assert_eq!(report(2.0, 3.5).suspect(), Some(Slip::PositionsLater));
}
