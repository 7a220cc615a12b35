//! `oven policy` and `oven doctor` on AWS, and what a bake asks before it begins: the real programs, against the
//! EC2-shaped server.

use oven_ec2_server::ServerOptions;
use oven_testing::Ec2World;
use oven_testing::ec2_world::{Ended, HANGS, HERE};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

/// What `oven policy` prints, with nothing around it: no network, credentials, region, or rights.
fn policy(args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    let output = command.arg("policy").args(args).env_clear().current_dir("/").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn dry_runs(world: &Ec2World) -> Vec<String> {
    let calls = world.server.calls().into_iter().filter(|call| call.dry_run);
    calls.map(|call| call.action).collect()
}

fn lacks(ended: &Ended) -> Vec<&str> {
    ended.out.lines().filter(|line| line.starts_with("lacks")).collect()
}

/// The object that a JSON stream ends with.
fn object(ended: &Ended) -> Value {
    serde_json::from_str(ended.out.lines().last().unwrap()).unwrap()
}

#[test]
fn with_the_policy_that_is_printed_all_goes_well() {
    let options = ServerOptions { policy: Some(policy(&[])), ..ServerOptions::default() };
    let world = Ec2World::tiny(options);
    let baked = world.bake("a bake");
    assert_eq!(baked.code(), Some(0), "{}\n{}", baked.err, world.calls());
    let ami = baked.image().unwrap().to_owned();
    world.assert_one(&ami, "a bake");
    // Asked before anything is made, and only for what a bake begins and ends with.
    assert_eq!(dry_runs(&world), ["CreateVolume", "RegisterImage"]);
    let calls: Vec<_> = world.server.calls().into_iter().filter(|call| call.service == "ec2").collect();
    let first = calls.iter().position(|call| call.dry_run).unwrap();
    assert!(calls[..first].iter().all(|call| call.action.starts_with("Describe")), "{calls:?}");
    assert!(world.asked() <= 25, "{}", world.calls());
    // A hit asks nothing of the kind, and no more than it must.
    world.server.forget_calls();
    let hit = world.bake("a hit");
    assert_eq!((hit.code(), hit.image()), (Some(0), Some(&*ami)), "{}", hit.err);
    let calls: Vec<_> = world.server.calls().into_iter().filter(|call| call.service == "ec2").collect();
    assert!(calls.len() <= 3 && dry_runs(&world).is_empty(), "{calls:?}");
    // The next miss of this role today does without, too.
    world.server.forget_calls();
    world.local.write("image/new", "x");
    let again = world.bake("another bake");
    assert_eq!(again.code(), Some(0), "{}", again.err);
    assert_eq!(dry_runs(&world), Vec::<String>::new());
    // A sweep looks at everything, and finds nothing.
    let swept = world.expect(0, &["sweep", "--older-than", "0s"]);
    assert!(swept.err.contains("there are no leftovers of ended runs"), "{}", swept.err);
    let refused = world.server.calls().into_iter().find(|call| call.answer == "UnauthorizedOperation");
    assert!(refused.is_none(), "{refused:?}");
}

#[test]
fn a_bake_that_may_not_end_does_not_begin() {
    let denied = ["RegisterImage".to_owned()].into();
    let world = Ec2World::tiny(ServerOptions { denied, ..ServerOptions::default() });
    let ended = world.bake("not permitted");
    assert_eq!(ended.code(), Some(6), "{}", ended.err);
    for words in ["the role lacks permissions: ec2:RegisterImage", "oven doctor", "oven policy"] {
        assert!(ended.err.contains(words), "no {words:?} in {}", ended.err);
    }
    assert!(
        world.server.calls().iter().all(|call| call.dry_run || call.action != "CreateVolume"),
        "{}",
        world.calls()
    );
    assert_eq!(world.made(), Default::default());
}

#[test]
fn the_policy_for_keys_and_partitions() {
    let key = "arn:aws:kms:eu-central-1:123456789012:key/0123abcd";
    let with_key = policy(&["--kms-key", key]).to_string();
    assert!(with_key.contains(key) && with_key.contains("kms:CreateGrant"));
    assert!(!policy(&[]).to_string().contains("kms:"));
    assert!(policy(&["--region", "cn-north-1"]).to_string().contains("arn:aws-cn:ec2:"));
    let world = Ec2World::tiny(ServerOptions::default());
    let json = world.expect(0, &["--json", "policy"]);
    assert_eq!(object(&json)["policy"], policy(&[]));
    let alias = world.expect(2, &["policy", "--kms-key", "alias/images"]);
    assert!(alias.err.contains("describe-key"), "{}", alias.err);
    assert!(world.server.calls().is_empty(), "{}", world.calls());
}

#[test]
fn doctor_looks_at_everything_and_changes_nothing() {
    let world = Ec2World::tiny(ServerOptions { policy: Some(policy(&[])), ..ServerOptions::default() });
    let ended = world.expect(8, &["doctor"]);
    // This machine has no EBS volumes; all else is there.
    assert!(lacks(&ended).len() == 1 && lacks(&ended)[0].contains("no NVMe disks"), "{}", ended.out);
    for line in [
        "ok     instance i-0123456789abcdef0 in us-east-1a\n",
        "ok     credentials ASIAOVENTESTSERVER01\n",
        "ok     EC2 in us-east-1\n",
        "ok     clock\n",
        "ok     directory /var/lib/oven\n",
        "ok     cgroup v2 and BPF\n",
        "ok     a contained step with the network\n",
    ] {
        assert!(ended.out.contains(line), "no {line:?} in {}", ended.out);
    }
    assert!(
        !ended.out.contains("loop devices") && !ended.out.contains("a disk in the region"),
        "{}",
        ended.out
    );
    assert!(ended.took < Duration::from_secs(30), "{:?}", ended.took);
    let calls = world.server.calls();
    let really: BTreeSet<&str> = calls
        .iter()
        .filter(|call| call.service == "ec2" && !call.dry_run)
        .map(|call| &*call.action)
        .collect();
    assert_eq!(really, BTreeSet::new());
    assert_eq!(world.made(), Default::default());
    // Each action of the policy is in the list, judged or not.
    let json = object(&world.expect(8, &["--json", "doctor"]));
    let told = json["permissions"].as_array().unwrap().iter();
    let told: BTreeSet<&str> = told.map(|permission| permission["action"].as_str().unwrap()).collect();
    let all = oven::cloud::iam_policy::actions(oven::cloud::iam_policy::DiskAccess::Attached);
    assert_eq!(told, all.iter().map(String::as_str).collect());
    assert_eq!(json["fit"], false);
    let machine =
        object(&world.start(world.plain(&["--json", "doctor"])).end(HANGS, "doctor of a local region"));
    assert!(machine.get("permissions").is_none(), "{machine}");
}

#[test]
fn doctor_reports_all_missing_permissions_in_one_line() {
    let denied = ["CreateVolume", "DescribeSnapshots", "RegisterImage"].map(str::to_owned).into();
    let world = Ec2World::tiny(ServerOptions { denied, ..ServerOptions::default() });
    let ended = world.expect(8, &["-q", "doctor"]);
    let wanted = "lacks  permissions: the role lacks ec2:DescribeSnapshots, ec2:CreateVolume, ec2:RegisterImage. `oven \
                  policy` prints the minimal policy.";
    assert!(lacks(&ended).contains(&wanted), "{}", ended.out);
}

#[test]
fn doctor_reports_why_ec2_is_unreachable() {
    let world = Ec2World::tiny(ServerOptions::default());
    let none = Ec2World::tiny(ServerOptions { role: None, ..ServerOptions::default() });
    let late = Ec2World::tiny(ServerOptions { clock_ahead: 900, ..ServerOptions::default() });
    let run = |world: &Ec2World, pairs: &[(&str, &str)]| {
        let mut command = world.plain(&["--cloud", "aws", "doctor"]);
        command.envs(pairs.iter().copied());
        let ended = world.start(command).end(HANGS, "doctor");
        assert_eq!(ended.code(), Some(8), "{}\n{}", ended.out, ended.err);
        assert!(ended.took < Duration::from_secs(60), "{:?}", ended.took);
        ended
    };
    let region = ("AWS_REGION", "us-east-1");
    for (what, ended, words) in [
        ("no role", run(&none, &[]), ["credentials: no credentials were found", "Give the instance a role"]),
        ("clock", run(&late, &[]), ["clock: this machine's clock is 15m behind AWS's", "timedatectl"]),
        (
            "endpoint",
            run(&world, &[("AWS_ENDPOINT_URL", "http://127.0.0.1:1")]),
            ["EC2 in us-east-1: DescribeImages", "AWS_ENDPOINT_URL"],
        ),
        (
            "no metadata service",
            run(&world, &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1"), region]),
            ["instance: identifying this instance", "--instance-id and --zone"],
        ),
        (
            "another region",
            run(&world, &[("AWS_REGION", "eu-west-1")]),
            [
                "is in us-east-1a, but AWS_REGION sets the region eu-west-1",
                "Only volumes in the instance's zone",
            ],
        ),
    ] {
        let told = lacks(&ended);
        assert!(words.iter().all(|words| told.iter().any(|line| line.contains(words))), "{what}: {told:?}");
        // One failed check does not stop the others.
        assert!(told.iter().any(|line| line.contains("no NVMe disks")), "{what}: {told:?}");
        assert!(!told.iter().any(|line| line.contains("the role lacks")), "{what}: {told:?}");
    }
}

#[test]
fn every_call_of_a_bake_is_in_its_trace() {
    let world = Ec2World::tiny(ServerOptions::default());
    world.server.forget_calls();
    let trace = world.local.path("trace.json");
    let mut command = world.bake_on(HERE);
    command.env("OVEN_TEST_TRACE", &trace);
    let baked = world.start(command).end(HANGS, "a traced bake");
    assert_eq!(baked.code(), Some(0), "{}", baked.err);
    let text = std::fs::read_to_string(&trace).unwrap();
    // What the role's keys are is nobody's business.
    for key in ["not a secret", "of-the-test-server", "ASIA"] {
        assert!(!text.contains(key), "{key} in {text}");
    }
    let trace: Value = serde_json::from_str(&text).unwrap();
    let (mut sent, mut traced) = (BTreeMap::new(), BTreeMap::new());
    for call in world.server.calls().into_iter().filter(|call| call.service == "ec2") {
        *sent.entry(call.action).or_insert(0) += 1;
    }
    for event in trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X") {
        let name = event["name"].as_str().unwrap();
        let tries = event["args"]["tries"].as_u64().unwrap_or(1);
        if sent.contains_key(name) {
            *traced.entry(name.to_owned()).or_insert(0) += tries;
        }
    }
    assert_eq!(traced, sent);
    assert!(text.contains("the attachment of vol-") && text.contains("waiting for"), "{text}");
}
