//! S0: the role: what it may not do, keys that grow old in the middle of a bake, a clock that is wrong.

use super::case::{End, all, case, error, is_of, prove, says};
use super::fixture::{Ec2Fixture, config, options};
use aws_config::imds::credentials::ImdsCredentialsProvider;
use oven::cloud::aws::ec2::Ec2;
use oven::cloud::{Cloud, PermissionVerdict};
use oven::error::Kind;
use oven::ids::RunId;

/// What `oven doctor` asks for; of the second kind a refusal may only mean that our tags are missing.
const PLAIN: [&str; 7] = [
    "DescribeImages",
    "DescribeVolumes",
    "DescribeSnapshots",
    "DescribeInstances",
    "CreateVolume",
    "ModifyInstanceAttribute",
    "RegisterImage",
];
const OF_TAGS: [&str; 7] = [
    "AttachVolume",
    "DetachVolume",
    "DeleteVolume",
    "CreateSnapshot",
    "DeleteSnapshot",
    "DeregisterImage",
    "CreateTags",
];

/// Row 0.4: everything that is missing, in one list.
#[tokio::test]
async fn r0_4_all_that_is_missing_is_listed() {
    let mut denied = options(Vec::new());
    denied.denied.extend(PLAIN.iter().chain(&OF_TAGS).map(|action| (*action).to_owned()));
    for (denied, options) in [(true, denied), (false, options(Vec::new()))] {
        let fixture = Ec2Fixture::new(options);
        let all = fixture.ec2().permissions().await.unwrap();
        // Each is asked once.
        assert_eq!(fixture.server.calls().len(), PLAIN.len() + OF_TAGS.len(), "{:?}", fixture.server.calls());
        let verdict = |action: &str| {
            let name = format!("ec2:{action}");
            all.iter()
                .find(|p| p.action == name)
                .unwrap_or_else(|| panic!("{name} was not asked for"))
                .verdict
                .clone()
        };
        for action in PLAIN {
            match verdict(action) {
                // It was looked at what is asked for, after the permission was.
                PermissionVerdict::Unknown(why)
                    if ["ModifyInstanceAttribute", "RegisterImage"].contains(&action) =>
                {
                    assert!(!denied && why.contains("does not exist"), "{action}: {why}");
                }
                told => {
                    assert_eq!(
                        told,
                        if denied { PermissionVerdict::Missing } else { PermissionVerdict::Granted },
                        "{action}"
                    )
                }
            }
        }
        for action in OF_TAGS {
            match verdict(action) {
                PermissionVerdict::Unknown(why) => {
                    assert_eq!(denied, why.contains("UnauthorizedOperation"), "{action}: {why}")
                }
                told => assert!(!denied && told == PermissionVerdict::Granted, "{action}: {told:?}"),
            }
        }
        assert!(fixture.server.calls().iter().all(|call| call.dry_run), "nothing was really asked for");
        fixture.holds_nothing("permissions");
    }
}

/// Row 0.4: what a bake begins and ends with is asked for before it begins.
#[tokio::test]
async fn r0_4_what_a_bake_needs_is_asked_first() {
    for action in ["CreateVolume", "RegisterImage"] {
        let mut denied = options(Vec::new());
        denied.denied.insert(action.to_owned());
        let fixture = Ec2Fixture::new(denied);
        let (ended, _) = fixture.bake().await;
        let error = ended.result.unwrap_err();
        is_of(&error, Kind::Cloud);
        says(&error, &[&format!("lacks permissions: ec2:{action}"), "oven doctor", "oven policy"], action);
        assert_eq!(fixture.ever(), (0, 0, 0), "{action}");
        fixture.holds_nothing(action);
        fixture.server.set(|o| o.denied.clear());
        fixture.heals(action).await;
    }
}

/// Row 0.4: without a right that is not asked for first, the bake ends where it needs it, and says which.
#[tokio::test]
async fn r0_4_what_is_missing_in_the_middle() {
    let cases = [
        ("DescribeVolumes", "ec2:DescribeVolumes"),
        ("AttachVolume", "ec2:AttachVolume"),
        ("ModifyInstanceAttribute", "ec2:ModifyInstanceAttribute"),
        ("CreateSnapshot", "ec2:CreateSnapshot"),
    ];
    for (action, _) in cases {
        let mut denied = options(Vec::new());
        denied.denied.insert(action.to_owned());
        let fixture = Ec2Fixture::new(denied);
        let (ended, _) = fixture.bake().await;
        let error = ended.result.expect_err(action);
        says(&error, &[action, "UnauthorizedOperation", "(request ", "oven policy"], action);
        let hidden = action == "DescribeVolumes";
        assert_eq!(ended.leftovers.len(), usize::from(hidden), "{action}: {:?}", ended.leftovers);
        if !hidden {
            fixture.holds_nothing(action);
        }
        fixture.is_clean(action);
    }
}

/// The least policy is enough for all of it, and for nothing of a stranger's.
#[tokio::test]
async fn t21_the_least_policy_is_enough() {
    let mut least = options(vec![error("CreateSnapshot", 1, "SnapshotLimitExceeded")]);
    least.policy =
        Some(oven::cloud::iam_policy::policy(oven::cloud::iam_policy::DiskAccess::Attached, None, &[]));
    let fixture = Ec2Fixture::new(least);
    let (ended, _) = fixture.bake().await;
    says(&ended.result.unwrap_err(), &["SnapshotLimitExceeded"], "policy");
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("a failed bake by the least policy");
    let (ended, _) = fixture.bake().await;
    assert_eq!(ended.leftovers, []);
    fixture.holds_one(&ended.result.unwrap(), "by the least policy");
    let missing: Vec<String> = fixture
        .ec2()
        .permissions()
        .await
        .unwrap()
        .into_iter()
        .filter(|p| p.verdict == PermissionVerdict::Missing)
        .map(|p| p.action)
        .collect();
    assert_eq!(missing, Vec::<String>::new());
}

/// Row 0.5: the clock is wrong by more than a signature allows: it is reported at the first call, and by how much.
#[tokio::test]
async fn r0_5_a_wrong_clock_is_named() {
    for (ahead, texts) in [(1200, ["behind AWS's", "20m"]), (-1200, ["ahead of AWS's", "timedatectl"])] {
        let mut skewed = options(Vec::new());
        skewed.clock_ahead = ahead;
        let fixture = Ec2Fixture::new(skewed);
        let (ended, _) = fixture.bake().await;
        let error = ended.result.unwrap_err();
        says(&error, &["RequestExpired", texts[0], "clock is"], "skew");
        assert_eq!(fixture.server.calls().len(), 1, "reported after the first call");
        fixture.holds_nothing("skew");
    }
}

/// Row 0.6: any call may be the one whose credentials are too old.
#[tokio::test]
async fn r0_6_expired_tokens_anywhere() {
    let actions = [
        "DescribeImages",
        "CreateVolume",
        "DescribeVolumes",
        "AttachVolume",
        "ModifyInstanceAttribute",
        "CreateSnapshot",
        "DescribeSnapshots",
        "RegisterImage",
        "DetachVolume",
        "DeleteVolume",
    ];
    prove(actions.map(|action| case("0.6", &[error(action, 1, "ExpiredToken")], End::Baked))).await;
}

/// Row 0.6: keys that grow old all the time are taken anew, and the bake goes on.
#[tokio::test]
async fn r0_6_keys_that_grow_old() {
    all([2, 3, 5].map(|calls| async move {
        let mut short = options(Vec::new());
        short.calls_per_key = Some(calls);
        let fixture = Ec2Fixture::new(short);
        // The instance's role: a new key each time that it is asked for.
        let imds = aws_config::imds::Client::builder().endpoint(fixture.server.imds()).unwrap().build();
        let provider = ImdsCredentialsProvider::builder().imds_client(imds).build();
        let config = config(&fixture.server.endpoint()).to_builder().credentials_provider(provider).build();
        let ec2 = Ec2::with_config(config, fixture.options(|_| ()));
        let ended = fixture.bake_by(&ec2, &RunId::new()).await;
        assert_eq!(ended.leftovers, []);
        fixture.holds_one(&ended.result.unwrap(), "keys that grow old");
        let asked =
            |call: &&oven_ec2_server::Call| call.service == "imds" && call.action.ends_with("oven-builder");
        assert!(fixture.server.calls().iter().filter(asked).count() > 3);
    }))
    .await;
}

/// Row 0.6: credentials that stay too old end the bake, and do not hold it up.
#[tokio::test]
async fn r0_6_no_new_keys() {
    let fault = error("DescribeImages", 1, "ExpiredToken").times(100);
    prove([case("0.6", &[fault], End::Fails(&["ExpiredToken", "(request "])).count("DescribeImages", 4)])
        .await;
}
