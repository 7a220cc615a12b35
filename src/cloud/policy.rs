//! The least IAM policy that oven works with: `oven policy`.

use super::tag;
use serde_json::{Value, json};

/// Reads that know no resources (Service Authorization Reference).
const READS: &[&str] =
    &["ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeSnapshots", "ec2:DescribeVolumes"];

/// The policy. What is made must carry the tag of a run, and only what carries one is changed or deleted. `kms_key`: the
/// ARN of a key that volumes are encrypted with.
pub fn policy(kms_key: Option<&str>) -> Value {
    let ec2 = |kind: &str| format!("arn:aws:ec2:*::{kind}/*");
    let owned = |kind: &str| format!("arn:aws:ec2:*:*:{kind}/*");
    let requested = json!({ "StringLike": { format!("aws:RequestTag/{}", tag::RUN): "*" } });
    let ours = json!({ "StringLike": { format!("ec2:ResourceTag/{}", tag::RUN): "*" } });
    let allow = |sid: &str, actions: &[&str], resources: &[String]| json!({ "Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources });
    let allow_if = |sid: &str, actions: &[&str], resources: &[String], condition: &Value| {
        let mut statement = allow(sid, actions, resources);
        statement["Condition"] = condition.clone();
        statement
    };
    let mut statements = vec![
        allow("Look", READS, &["*".to_owned()]),
        allow(
            "BaseParameters",
            &["ssm:GetParameter"],
            &["arn:aws:ssm:*:*:parameter/aws/service/*".to_owned()],
        ),
        allow_if("MakeVolumes", &["ec2:CreateVolume"], &[owned("volume")], &requested),
        allow("OfAnySnapshot", &["ec2:CreateVolume", "ec2:RegisterImage"], &[ec2("snapshot")]),
        allow_if("MakeSnapshots", &["ec2:CreateSnapshot"], &[ec2("snapshot")], &requested),
        allow_if("OfOurVolumes", &["ec2:CreateSnapshot"], &[owned("volume")], &ours),
        allow_if("MakeImages", &["ec2:RegisterImage"], &[ec2("image")], &requested),
        allow_if(
            "TagWhatIsMade",
            &["ec2:CreateTags"],
            &[owned("volume"), ec2("snapshot"), ec2("image")],
            &json!({
                "StringEquals": { "ec2:CreateAction": ["CreateVolume", "CreateSnapshot", "RegisterImage"] },
            }),
        ),
        allow_if(
            "ChangeOurs",
            &[
                "ec2:AttachVolume",
                "ec2:CreateTags",
                "ec2:DeleteSnapshot",
                "ec2:DeleteVolume",
                "ec2:DeregisterImage",
                "ec2:DetachVolume",
            ],
            &[owned("volume"), ec2("snapshot"), ec2("image")],
            &ours,
        ),
        allow(
            "ThisInstance",
            &["ec2:AttachVolume", "ec2:DetachVolume", "ec2:ModifyInstanceAttribute"],
            &[owned("instance")],
        ),
        // Instance attributes name the volume, too.
        allow_if("EndWithTheInstance", &["ec2:ModifyInstanceAttribute"], &[owned("volume")], &ours),
    ];
    if let Some(key) = kms_key {
        let actions =
            ["kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncrypt*"];
        statements.push(allow("UseTheKey", &actions, &[key.to_owned()]));
        let by_aws = json!({ "Bool": { "kms:GrantIsForAWSResource": "true" } });
        statements.push(allow_if("LendTheKeyToEbs", &["kms:CreateGrant"], &[key.to_owned()], &by_aws));
    }
    json!({ "Version": "2012-10-17", "Statement": statements })
}

/// The same as text.
pub fn text(kms_key: Option<&str>) -> String {
    serde_json::to_string_pretty(&policy(kms_key)).expect("strings and lists")
}

/// Every action that the policy permits.
pub fn actions() -> Vec<String> {
    let policy = policy(None);
    let statements = policy["Statement"].as_array().into_iter().flatten();
    let actions = statements.flat_map(|statement| statement["Action"].as_array().into_iter().flatten());
    let mut actions: Vec<String> = actions.filter_map(|action| action.as_str().map(str::to_owned)).collect();
    actions.sort();
    actions.dedup();
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_needs_a_tag() {
        let policy = policy(None);
        for statement in policy["Statement"].as_array().unwrap() {
            let sid = statement["Sid"].as_str().unwrap();
            let open = ["Look", "BaseParameters", "OfAnySnapshot", "ThisInstance"].contains(&sid);
            assert_eq!(statement.get("Condition").is_none(), open, "{sid}");
            let all = statement["Resource"] == json!(["*"]);
            assert_eq!(all, sid == "Look", "{sid}");
        }
        assert!(!text(None).contains("kms:"));
        assert!(text(Some("arn:aws:kms:eu-central-1:1:key/k")).contains("kms:CreateGrant"));
    }

    #[test]
    fn no_wildcards() {
        assert!(actions().iter().all(|action| !action.contains('*')));
    }
}
