//! Every row of the table of error classes, on calls that a bake makes.

use super::case::{Case, End, case, error, lost_after, lost_before, prove};
use oven_ec2_server::{Fault, ServerOptions, What};
use std::time::Duration;

/// Calls of a bake, each of which comes once if nothing goes wrong.
const ONCE: [&str; 7] = [
    "CreateVolume",
    "AttachVolume",
    "ModifyInstanceAttribute",
    "CreateSnapshot",
    "RegisterImage",
    "DetachVolume",
    "DeleteVolume",
];
const LOOKS: [&str; 3] = ["DescribeImages", "DescribeVolumes", "DescribeSnapshots"];

/// The snapshot is pending for longer than its volume takes to be detached, a call that hangs included: nobody waits
/// for that, and what was not sent again by then need not be.
fn pending(options: &mut ServerOptions) {
    options.delays.snapshot = Duration::from_secs(6);
}

fn one(row: &'static str, action: &'static str, nth: u32, what: What) -> Case {
    case(row, &[Fault::new(action, nth, what)], End::Baked)
}

/// Nothing was done, for there were too many calls: asked again, once for each refusal.
#[tokio::test]
async fn backoff() {
    let codes = [
        "RequestLimitExceeded",
        "EC2ThrottledException",
        "Throttling",
        "ThrottlingException",
        "RequestThrottledException",
        "SlowDown",
        "ConcurrentLimitExceededException",
    ];
    let mut cases = Vec::new();
    for (n, code) in codes.into_iter().enumerate() {
        // All codes on one action, and all actions with one code.
        let actions: Vec<&'static str> = if n == 0 {
            ONCE.iter().chain(&LOOKS).copied().collect()
        } else {
            vec!["CreateSnapshot", "DescribeVolumes"]
        };
        for action in actions {
            let case = case("backoff", &[error(action, 1, code).times(2)], End::Baked);
            cases.push(if ONCE.contains(&action) { case.count(action, 3) } else { case });
        }
    }
    for code in ["SnapshotCreationPerVolumeRateExceeded", "ConcurrentSnapshotLimitExceeded"] {
        let case = case("backoff", &[error("CreateSnapshot", 1, code).times(2)], End::Baked);
        cases.push(case.count("CreateSnapshot", 3));
    }
    prove(cases).await;
}

/// A call with a token, or one that does the same again, is sent again.
#[tokio::test]
async fn resend() {
    let mut cases = Vec::new();
    for action in ["CreateVolume", "ModifyInstanceAttribute", "DetachVolume", "DeleteVolume"] {
        for what in lost_before().into_iter().chain(lost_after()) {
            let case = one("resend", action, 1, what).count(action, 2);
            cases.push(if action == "DetachVolume" { case.set(pending) } else { case });
        }
    }
    for action in LOOKS {
        for what in lost_before().into_iter().chain([What::DropAfter, What::HangAfter]) {
            for nth in [1, 2] {
                cases.push(one("resend", action, nth, what.clone()));
            }
        }
    }
    for code in
        ["InternalFailure", "InternalServerError", "ServiceUnavailable", "Unavailable", "RequestTimeout"]
    {
        cases.push(one("resend", "CreateVolume", 1, What::ErrorAfter(code.into())).count("CreateVolume", 2));
    }
    prove(cases).await;
}

/// One without is never sent again where it took effect.
#[tokio::test]
async fn reconcile() {
    let mut cases = Vec::new();
    for action in ["AttachVolume", "CreateSnapshot", "RegisterImage"] {
        for what in lost_after() {
            cases.push(one("reconcile after", action, 1, what).count(action, 1));
        }
        for what in lost_before() {
            cases.push(one("reconcile before", action, 1, what).count(action, 2));
        }
        for code in ["InternalFailure", "ServiceUnavailable", "RequestTimeout"] {
            cases.push(one("reconcile after", action, 1, What::ErrorAfter(code.into())).count(action, 1));
        }
    }
    prove(cases).await;
}

/// What we made may not show yet, and not be ready yet.
#[tokio::test]
async fn not_yet() {
    let saying = |code: &str, text: &str| What::ErrorSaying(code.into(), text.into());
    let mut cases: Vec<Case> = [
        ("AttachVolume", "InvalidVolume.NotFound"),
        ("CreateSnapshot", "InvalidVolume.NotFound"),
        ("RegisterImage", "InvalidSnapshot.NotFound"),
    ]
    .into_iter()
    .map(|(action, code)| case("not yet", &[error(action, 1, code).times(2)], End::Baked).count(action, 3))
    .collect();
    for (action, text) in [
        ("CreateVolume", "Snapshot is in invalid state - pending"),
        ("AttachVolume", "vol-1 is creating"),
        ("RegisterImage", "Snapshot snap-1 is in invalid state - pending"),
    ] {
        cases.push(one("not yet", action, 1, saying("IncorrectState", text)).count(action, 2));
    }
    // What we did not make is not waited for.
    let absent = case(
        "not ours",
        &[error("CreateVolume", 1, "InvalidSnapshot.NotFound")],
        End::Fails(&["InvalidSnapshot.NotFound"]),
    );
    cases.push(absent.count("CreateVolume", 1));
    let instance = error("AttachVolume", 1, "InvalidInstanceID.NotFound");
    cases.push(
        case("not ours", &[instance], End::Fails(&["InvalidInstanceID.NotFound", "(request "]))
            .count("AttachVolume", 1),
    );
    prove(cases).await;
}

/// It is so already. (That the name is taken by the same bake: row 15.2.)
#[tokio::test]
async fn as_good_as_done() {
    let failed = error("RegisterImage", 1, "InvalidParameterValue");
    let fails = End::Fails(&["InvalidParameterValue"]);
    let gone = |action: &'static str, code: &str| [failed.clone(), error(action, 1, code)];
    prove([
        // The answer comes too early: polled again.
        case("done", &[error("DetachVolume", 1, "IncorrectState")], End::Baked),
        case("done", &[error("DetachVolume", 1, "InvalidAttachment.NotFound")], End::Baked),
        case("done", &[error("DetachVolume", 1, "InvalidVolume.NotFound")], End::Baked),
        // After a lost one that took effect.
        case("done", &[Fault::new("DeleteVolume", 1, What::DropAfter)], End::Baked).count("DeleteVolume", 2),
        case("done", &[Fault::new("DetachVolume", 1, What::DropAfter)], End::Baked)
            .set(pending)
            .count("DetachVolume", 2),
        case("done", &[failed.clone(), Fault::new("DeleteSnapshot", 1, What::DropAfter)], fails)
            .count("DeleteSnapshot", 2),
        case("done", &gone("DetachVolume", "IncorrectState"), fails),
    ])
    .await;
}

/// Refused, and not asked again: nothing is left, and the error has the code, the request and, if known, a remedy.
#[tokio::test]
async fn terminal() {
    const ALL: [(&str, &[&str]); 14] = [
        ("UnauthorizedOperation", &["UnauthorizedOperation", "oven policy", "(request "]),
        ("AuthFailure", &["AuthFailure", "get-caller-identity", "(request "]),
        ("InvalidParameterValue", &["InvalidParameterValue", "(request "]),
        ("InvalidParameterCombination", &["InvalidParameterCombination", "(request "]),
        ("InvalidParameter", &["InvalidParameter", "(request "]),
        ("MissingParameter", &["MissingParameter", "(request "]),
        ("OptInRequired", &["OptInRequired", "Enable this region", "(request "]),
        ("ConflictException", &["ConflictException", "(request "]),
        ("ValidationException", &["ValidationException", "(request "]),
        ("SnapshotLimitExceeded", &["SnapshotLimitExceeded", "quota", "(request "]),
        ("AMIQuotaExceeded", &["AMIQuotaExceeded", "quota", "(request "]),
        ("ResourceLimitExceeded", &["ResourceLimitExceeded", "(request "]),
        ("PendingVerification", &["PendingVerification", "the e-mail", "(request "]),
        ("OperationNotPermitted", &["OperationNotPermitted", "(request "]),
    ];
    let mut cases = Vec::new();
    for (n, (code, texts)) in ALL.into_iter().enumerate() {
        let actions: &[&str] = if n < 2 {
            &["CreateVolume", "AttachVolume", "ModifyInstanceAttribute", "CreateSnapshot", "RegisterImage"]
        } else {
            &["CreateSnapshot", "RegisterImage"]
        };
        for action in actions {
            cases.push(
                case("terminal", &[error(action, 1, code).times(9)], End::Fails(texts)).count(action, 1),
            );
        }
    }
    // What AWS says in these cases has words in it that are about credentials.
    for (code, text) in [
        ("AuthFailure", "AWS was not able to validate the provided access credentials"),
        (
            "UnauthorizedOperation",
            "User: arn:aws:sts::1:assumed-role/r/i is not authorized to perform: ec2:CreateSnapshot because no identity-based policy allows the ec2:CreateSnapshot action",
        ),
    ] {
        let what = What::ErrorSaying(code.into(), text.into());
        let fault = Fault::new("CreateSnapshot", 1, what).times(9);
        let texts: &'static [&'static str] = if code == "AuthFailure" {
            &["AuthFailure", "(request "]
        } else {
            &["UnauthorizedOperation", "oven policy"]
        };
        cases.push(case("terminal", &[fault], End::Fails(texts)).count("CreateSnapshot", 1));
    }
    prove(cases).await;
}
