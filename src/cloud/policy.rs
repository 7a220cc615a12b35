//! The least IAM policy that oven works with: `oven policy`.

use super::tag;
use serde_json::{Value, json};

/// Reads that know no resources (Service Authorization Reference).
const READS: &[&str] =
    &["ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeSnapshots", "ec2:DescribeVolumes"];

/// The policy. What is made must carry the tag of a run, and only what carries one is changed or deleted. `region`: any
/// one of the partition that it is for; `kms_keys`: the ARNs of keys that volumes are encrypted with.
pub fn policy(region: Option<&str>, kms_keys: &[String]) -> Value {
    let partition = partition(region.unwrap_or_default());
    // Images and snapshots are of no account in an ARN.
    let ec2 = |kind: &str| format!("arn:{partition}:ec2:*::{kind}/*");
    let owned = |kind: &str| format!("arn:{partition}:ec2:*:*:{kind}/*");
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
            &[format!("arn:{partition}:ssm:*:*:parameter/aws/service/*")],
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
    if !kms_keys.is_empty() {
        let actions =
            ["kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncrypt*"];
        statements.push(allow("UseTheKeys", &actions, kms_keys));
        let by_aws = json!({ "Bool": { "kms:GrantIsForAWSResource": "true" } });
        statements.push(allow_if("LendTheKeysToEbs", &["kms:CreateGrant"], kms_keys, &by_aws));
    }
    json!({ "Version": "2012-10-17", "Statement": statements })
}

/// What the ARNs of a region begin with.
fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// As it is pasted into IAM.
pub fn text(policy: &Value) -> String {
    serde_json::to_string_pretty(policy).expect("strings and lists")
}

/// Every action that the policy permits.
pub fn actions() -> Vec<String> {
    let policy = policy(None, &[]);
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
        let policy = policy(None, &[]);
        for statement in policy["Statement"].as_array().unwrap() {
            let sid = statement["Sid"].as_str().unwrap();
            let open = ["Look", "BaseParameters", "OfAnySnapshot", "ThisInstance"].contains(&sid);
            assert_eq!(statement.get("Condition").is_none(), open, "{sid}");
            let all = statement["Resource"] == json!(["*"]);
            assert_eq!(all, sid == "Look", "{sid}");
        }
        assert!(!text(&policy).contains("kms:"));
        let key = "arn:aws:kms:eu-central-1:123456789012:key/k";
        let with_key = super::policy(None, &[key.to_owned()]);
        let of_keys =
            with_key["Statement"].as_array().unwrap().iter().filter(|s| s["Resource"] == json!([key]));
        assert_eq!(of_keys.count(), 2);
        assert!(text(&with_key).contains("kms:CreateGrant"));
    }

    #[test]
    fn of_each_partition() {
        let of = |region| text(&policy(Some(region), &[]));
        assert!(of("cn-north-1").contains("arn:aws-cn:ec2:") && !of("cn-north-1").contains("arn:aws:"));
        assert!(of("us-gov-east-1").contains("arn:aws-us-gov:ssm:"));
        assert_eq!(of("eu-central-1"), text(&policy(None, &[])));
    }

    /// A managed policy may have 6144 characters without blanks, a role's own 10240 (IAM quotas).
    #[test]
    fn it_fits_where_it_is_put() {
        assert!(policy(None, &[]).to_string().len() < 6144);
    }

    #[test]
    fn no_wildcards() {
        assert!(actions().iter().all(|action| !action.contains('*')));
    }
}
