//! Ranking and both searches on the host: one call for every decode step, so its time is a step's.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use dspark::schedule::{Ranking, Ticks};

const DRAFT_LEN: usize = 7;

/// Survivals of requests between sure and hopeless, falling along each.
fn survivals(num_reqs: usize) -> Vec<f32> {
    (0..num_reqs)
        .flat_map(|r| {
            let confidence = 0.3 + 0.65 * (r * 37 % 101) as f32 / 101.0;
            (1..=DRAFT_LEN as i32).map(move |k| confidence.powi(k))
        })
        .collect()
}

fn plans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    for num_reqs in [1, 32, 256] {
        let survival = survivals(num_reqs);
        let limits = vec![DRAFT_LEN; num_reqs];
        let seconds = |drafts: usize| 6e-3 + 1e-6 * (num_reqs + drafts) as f64;
        group.bench_function(BenchmarkId::from_parameter(num_reqs), |bencher| {
            bencher.iter(|| {
                let ranking = Ranking::new(black_box(&survival), DRAFT_LEN, &limits);
                let ticks = Ticks::new(num_reqs * DRAFT_LEN, seconds);
                ranking.verify_lens(ranking.first_fall(&ticks).max(ranking.best(&ticks)))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);
