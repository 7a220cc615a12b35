//! One row's fault, injected into a bake, and what comes of it.

use super::fixture::{Ec2Fixture, options};
use oven::error::{Kind, hint_of};
use oven_ec2_server::{Fault, ServerOptions, What};
use std::future::Future;
use tokio::task::{JoinSet, LocalSet};

/// What is lost before the effect: nothing happened.
pub fn lost_before() -> [What; 5] {
    [
        What::StatusBefore(500),
        What::StatusBefore(503),
        What::DropBefore,
        What::HangBefore,
        What::Error("InternalError".into()),
    ]
}

/// What is lost after it: it happened, and the answer is lost.
pub fn lost_after() -> [What; 6] {
    [
        What::StatusAfter(500),
        What::StatusAfter(503),
        What::DropAfter,
        What::HangAfter,
        What::ErrorAfter("InternalError".into()),
        What::ErrorAfter("Unavailable".into()),
    ]
}

pub fn error(action: &str, nth: u32, code: &str) -> Fault {
    Fault::new(action, nth, What::Error(code.into()))
}

/// How a case ends.
#[derive(Debug, Clone, Copy)]
pub enum End {
    Baked,
    /// With an error that says all of it, or in its hint; nothing is left, and the next bake succeeds.
    Fails(&'static [&'static str]),
}

/// One row's fault, injected, and what comes of it.
pub struct Case {
    pub row: &'static str,
    pub options: ServerOptions,
    pub end: End,
    /// How many calls of an action there were.
    pub counts: Vec<(&'static str, usize)>,
}

pub fn case(row: &'static str, faults: &[Fault], end: End) -> Case {
    Case { row, options: options(faults.to_vec()), end, counts: Vec::new() }
}

impl Case {
    pub fn count(mut self, action: &'static str, times: usize) -> Self {
        self.counts.push((action, times));
        self
    }

    pub fn set(mut self, change: impl FnOnce(&mut ServerOptions)) -> Self {
        change(&mut self.options);
        self
    }

    pub async fn prove(self) {
        let what = format!("row {}: {:?}", self.row, self.options.faults);
        let fixture = Ec2Fixture::new(self.options);
        let (ended, run) = fixture.bake().await;
        assert_eq!(ended.leftovers, [], "{what}: {:?}", ended.result);
        for (action, times) in &self.counts {
            let calls = fixture.calls().join(" ");
            assert_eq!(fixture.count(action), *times, "{action}, {what}: {:?}\n{calls}", ended.result);
        }
        match (ended.result, self.end) {
            (Ok(image), End::Baked) => {
                assert!(image.was_created_by(&run), "{what}");
                fixture.holds_one(&image, &what);
            }
            (Err(error), End::Fails(texts)) => {
                says(&error, texts, &what);
                fixture.holds_nothing(&format!("{what}: {error:#}"));
                fixture.heals(&what).await;
            }
            (Ok(image), End::Fails(_)) => panic!("{what}: it was baked: {image:?}"),
            (Err(error), End::Baked) => panic!("{what}: {error:#}\n{}", fixture.calls().join(" ")),
        }
    }
}

impl Ec2Fixture {
    /// When nothing goes wrong any more, the next bake succeeds.
    pub async fn heals(&self, what: &str) {
        self.server.set(|now| *now = ServerOptions { others: now.others.clone(), ..options(Vec::new()) });
        let (ended, _) = self.bake().await;
        assert_eq!(ended.leftovers, [], "healed, {what}");
        let image = ended.result.unwrap_or_else(|error| panic!("healed, {what}: {error:#}"));
        self.holds_one(&image, &format!("healed, {what}"));
    }
}

/// The error says all of it, in its message or its hint.
pub fn says(error: &anyhow::Error, texts: &[&str], what: &str) {
    let told = format!("{error:#} | {}", hint_of(error).unwrap_or_default());
    for text in texts {
        assert!(told.contains(text), "{what}: {text:?} is not in: {told}");
    }
}

pub fn is_of(error: &anyhow::Error, kind: Kind) {
    assert_eq!(Kind::of(error), kind, "{error:#}");
}

/// Most of a case is waiting: several at a time.
pub async fn all<F: Future<Output = ()> + 'static>(cases: impl IntoIterator<Item = F>) {
    const AT_ONCE: usize = 8;
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut running = JoinSet::new();
            for case in cases {
                while running.len() >= AT_ONCE {
                    running.join_next().await.expect("some run").unwrap();
                }
                running.spawn_local(case);
            }
            while let Some(done) = running.join_next().await {
                done.unwrap();
            }
        })
        .await;
}

pub async fn prove(cases: impl IntoIterator<Item = Case>) {
    all(cases.into_iter().map(Case::prove)).await;
}
