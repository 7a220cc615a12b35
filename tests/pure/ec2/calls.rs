//! How many calls a bake and a hit make, and how long a hit takes.

use super::fixture::{Ec2Fixture, MILLI, key, options};
use oven::cloud::Cloud;
use oven::ids::RunId;
use oven_testing::ring;
use std::time::{Duration, Instant};

/// At most so many of EC2's calls for a bake, waits included, where nothing is delayed.
const BAKE: usize = 25;
/// For a hit.
const HIT: usize = 3;
/// What a hit takes beyond the server's answers.
const BEYOND: Duration = Duration::from_millis(150);

#[tokio::test]
async fn a_happy_bake_and_a_hit_make_few_calls() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let image = fixture.bake_by(&ec2, &run).await.result.unwrap();
    fixture.holds_one(&image, "happy");
    let all: Vec<String> = fixture
        .server
        .calls()
        .iter()
        .map(|call| if call.dry_run { format!("({})", call.action) } else { call.action.clone() })
        .collect();
    println!("a bake, {} calls: {}", all.len(), all.join(" "));
    // Dry runs are calls, too.
    assert!(all.len() <= BAKE, "{all:?}");
}

#[tokio::test]
async fn a_hit_takes_hardly_longer_than_its_answers() {
    // It measures.
    let _ring = ring::exclusive();
    for answer in [0, 50] {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        let image = fixture.bake().await.0.result.unwrap();
        fixture.server.set(|o| o.delays.answer = MILLI * answer);
        let mut times = Vec::new();
        for _ in 0..9 {
            fixture.server.forget_calls();
            // As a process does that begins with it: a client of its own, and a connection.
            let begun = Instant::now();
            let ec2 = fixture.ec2();
            ec2.base(&fixture.base).await.unwrap();
            let found = ec2.find(&key()).await.unwrap();
            times.push(begun.elapsed());
            assert_eq!(found.map(|found| found.id), Some(image.id.clone()));
            assert!(fixture.server.calls().len() <= HIT, "{:?}", fixture.calls());
        }
        times.sort();
        let answers = MILLI * answer * fixture.server.calls().len() as u32;
        println!(
            "a hit with answers after {answer} ms: {} calls, {:?} (best {:?}, worst {:?})",
            fixture.calls().len(),
            times[4],
            times[0],
            times[8]
        );
        // The best: the machine may be busy with other things.
        assert!(times[0] <= answers + BEYOND, "{times:?}");
    }
}
