//! The engine's counters in Prometheus' text format.

use std::fmt::Write as _;

use super::Engine;
use crate::ops::Ops;

/// Text exposition, one metric after the other.
#[derive(Default)]
struct Text(String);

impl Text {
    /// The lines before a metric's samples.
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.0,
            "# HELP dspark_{name} {help}\n# TYPE dspark_{name} {kind}"
        );
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let _ = writeln!(self.0, "dspark_{name} {value}");
    }

    /// A sample for each label value.
    fn labelled<L: std::fmt::Display>(
        &mut self,
        (name, kind, help): (&str, &str, &str),
        label: &str,
        samples: impl IntoIterator<Item = (L, f64)>,
    ) {
        self.head(name, kind, help);
        for (value, sample) in samples {
            let _ = writeln!(self.0, "dspark_{name}{{{label}=\"{value}\"}} {sample}");
        }
    }

    /// A sample for each draft position, from 1.
    fn by_position(&mut self, metric: (&str, &str, &str), samples: impl IntoIterator<Item = f64>) {
        let samples = samples.into_iter().enumerate();
        self.labelled(metric, "position", samples.map(|(k, n)| (k + 1, n)));
    }
}

impl<O: Ops> Engine<O> {
    /// What has happened since the engine was made, in Prometheus' text exposition format 0.0.4: counters of rounds and
    /// tokens, drafts by position (proposed, verified, reached, accepted, predicted), seconds by phase, requests, pages,
    /// and the scheduler's temperatures and cost factors.
    pub fn prometheus(&self) -> String {
        let mut text = Text::default();
        let (totals, times) = (self.totals(), self.times());
        let requests = [
            ("waiting", self.waiting.len()),
            ("running", self.active.len()),
        ];
        let requests = requests.map(|(state, n)| (state, n as f64));
        text.labelled(
            ("requests", "gauge", "Requests by state."),
            "state",
            requests,
        );
        let pages = [
            ("free", self.pool.num_free()),
            ("used", self.pool.num_pages() - self.pool.num_free()),
        ];
        let pages = pages.map(|(state, n)| (state, n as f64));
        text.labelled(("pages", "gauge", "KV pages by state."), "state", pages);
        for (name, help, value) in [
            (
                "rounds_total",
                "Decode rounds of all requests.",
                totals.num_rounds,
            ),
            (
                "committed_tokens_total",
                "Tokens committed by rounds, recovered and bonus tokens included.",
                totals.num_committed,
            ),
            (
                "verify_tokens_total",
                "Rows of verify passes, anchors included.",
                totals.num_verify_tokens,
            ),
        ] {
            text.one(name, "counter", help, value as f64);
        }
        let counts = |counts: &[u64]| counts.iter().map(|&n| n as f64).collect::<Vec<_>>();
        for (name, help, values) in [
            (
                "drafts_proposed_total",
                "Drafts made.",
                counts(&totals.proposed),
            ),
            (
                "drafts_verified_total",
                "Drafts verified.",
                counts(&totals.verified),
            ),
            (
                "drafts_reached_total",
                "Drafts verified whose predecessors were all accepted.",
                counts(&totals.reached),
            ),
            (
                "drafts_accepted_total",
                "Drafts accepted.",
                counts(&totals.accepted),
            ),
            (
                "drafts_predicted_total",
                "Acceptances predicted of the reached drafts.",
                totals.predicted.clone(),
            ),
        ] {
            text.by_position((name, "counter", help), values);
        }
        let phases = [
            ("prefill", times.prefill),
            ("propose", times.propose),
            ("schedule", times.schedule),
            ("verify", times.verify),
            ("commit", times.commit),
        ];
        let phases = phases.map(|(phase, time)| (phase, time.as_secs_f64()));
        let metric = ("phase_seconds_total", "counter", "Host seconds by phase.");
        text.labelled(metric, "phase", phases);
        let scheduler = self.step.scheduler();
        text.one(
            "bad_confidences_total",
            "counter",
            "Confidences that were no probabilities.",
            scheduler.bad_confidences() as f64,
        );
        if let Some(temperatures) = scheduler.temperatures() {
            let metric = (
                "sts_temperature",
                "gauge",
                "Temperature of a draft position.",
            );
            text.by_position(metric, temperatures.iter().map(|&t| f64::from(t)));
        }
        if let Some(cost) = scheduler.cost() {
            let factors = ["verify", "context", "draft"]
                .into_iter()
                .zip(cost.factors());
            let metric = (
                "cost_factor",
                "gauge",
                "Measured over profiled cost of a term.",
            );
            text.labelled(metric, "term", factors);
        }
        text.0
    }
}
