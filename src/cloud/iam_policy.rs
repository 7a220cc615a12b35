//! The minimal IAM policy for oven: `oven policy`.

use super::tag;
use serde_json::{Value, json};

/// Read actions that a policy cannot limit to certain resources (see AWS's Service Authorization Reference).
const READ_ACTIONS: &[&str] =
    &["ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeSnapshots", "ec2:DescribeVolumes"];

/// How bakes that use the role access their disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    /// As volumes that are attached to the builder.
    Attached,
    /// Through EBS direct.
    Direct,
    Both,
}

/// Returns the policy. It permits creating resources only with the tag [`tag::RUN`], and changing or deleting only
/// resources that have it. Copies of snapshots need the tag [`tag::COPY`] instead. With attached disks, the policy also
/// permits attaching and detaching tagged volumes, and changing attributes, at any instance of the account. `region` is
/// used only to select the AWS partition. `kms_keys` are the ARNs of the keys that volumes are encrypted with.
pub fn policy(access: DiskAccess, region: Option<&str>, kms_keys: &[String]) -> Value {
    let partition = partition(region.unwrap_or_default());
    // ARNs of images and snapshots have no account.
    let ec2_of = |kind: &str| format!("arn:{partition}:ec2:*::{kind}/");
    let ec2 = |kind: &str| format!("{}*", ec2_of(kind));
    let owned = |kind: &str| format!("arn:{partition}:ec2:*:*:{kind}/*");
    let has_run_tag = json!({ "StringLike": { format!("ec2:ResourceTag/{}", tag::RUN): "*" } });
    let allow = |sid: &str, actions: &[&str], resources: &[String]| json!({ "Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources });
    let allow_if = |sid: &str, actions: &[&str], resources: &[String], condition: &Value| {
        let mut statement = allow(sid, actions, resources);
        statement["Condition"] = condition.clone();
        statement
    };
    let (attached, direct) = (access != DiskAccess::Direct, access != DiskAccess::Attached);
    let request_has_tag = |key: &str| json!({ "StringLike": { format!("aws:RequestTag/{key}"): "*" } });
    let mut changeable = vec![ec2("snapshot"), ec2("image")];
    if attached {
        changeable.push(owned("volume"));
    }
    let mut creating = vec!["RegisterImage"];
    let mut statements = vec![
        allow("Look", READ_ACTIONS, &["*".to_owned()]),
        allow(
            "BaseParameters",
            &["ssm:GetParameter"],
            &[format!("arn:{partition}:ssm:*:*:parameter/aws/service/*")],
        ),
        allow("OfAnySnapshot", &["ec2:RegisterImage"], &[ec2("snapshot")]),
        allow_if("MakeImages", &["ec2:RegisterImage"], &[ec2("image")], &request_has_tag(tag::RUN)),
        allow_if(
            "ChangeOurs",
            &["ec2:CreateTags", "ec2:DeleteSnapshot", "ec2:DeregisterImage"],
            &changeable,
            &has_run_tag,
        ),
    ];
    if attached {
        creating.extend(["CreateVolume", "CreateSnapshot"]);
        statements.extend([
            allow_if("MakeVolumes", &["ec2:CreateVolume"], &[owned("volume")], &request_has_tag(tag::RUN)),
            allow("VolumesOfAnySnapshot", &["ec2:CreateVolume"], &[ec2("snapshot")]),
            allow_if(
                "MakeSnapshots",
                &["ec2:CreateSnapshot"],
                &[ec2("snapshot")],
                &request_has_tag(tag::RUN),
            ),
            allow_if("OfOurVolumes", &["ec2:CreateSnapshot"], &[owned("volume")], &has_run_tag),
            allow_if(
                "UseOurVolumes",
                &["ec2:AttachVolume", "ec2:DeleteVolume", "ec2:DetachVolume"],
                &[owned("volume")],
                &has_run_tag,
            ),
            allow(
                "ThisInstance",
                &["ec2:AttachVolume", "ec2:DetachVolume", "ec2:ModifyInstanceAttribute"],
                &[owned("instance")],
            ),
            // ModifyInstanceAttribute needs a permission for the volume in addition to the one for the instance.
            allow_if(
                "EndWithTheInstance",
                &["ec2:ModifyInstanceAttribute"],
                &[owned("volume")],
                &has_run_tag,
            ),
        ]);
    }
    if direct {
        creating.extend(["StartSnapshot", "CopySnapshot"]);
        let copies = json!({ "StringLike": { format!("ec2:ResourceTag/{}", tag::COPY): "*" } });
        // To test the tags of a resource, EBS direct supports only the global condition key `aws:ResourceTag`, and not
        // `ec2:ResourceTag`.
        let started = json!({ "StringLike": { format!("aws:ResourceTag/{}", tag::RUN): "*" } });
        statements.extend([
            allow("DirectLook", &["ec2:GetEbsEncryptionByDefault"], &["*".to_owned()]),
            allow("DirectRead", &["ebs:GetSnapshotBlock", "ebs:ListSnapshotBlocks"], &[ec2("snapshot")]),
            allow_if("DirectStart", &["ebs:StartSnapshot"], &[ec2("snapshot")], &request_has_tag(tag::RUN)),
            allow_if(
                "DirectWriteOurs",
                &["ebs:CompleteSnapshot", "ebs:PutSnapshotBlock"],
                &[ec2("snapshot")],
                &started,
            ),
            // `snap-*` matches only the source snapshot, because the copy has no id yet when this permission is
            // checked.
            allow("CopyAnySnapshot", &["ec2:CopySnapshot"], &[format!("{}snap-*", ec2_of("snapshot"))]),
            allow_if("MakeCopies", &["ec2:CopySnapshot"], &[ec2("snapshot")], &request_has_tag(tag::COPY)),
            // oven deletes a copy that failed, and a copy that it does not need because an older one exists.
            allow_if("DeleteCopies", &["ec2:DeleteSnapshot"], &[ec2("snapshot")], &copies),
        ]);
    }
    let creating = json!({ "StringEquals": { "ec2:CreateAction": creating } });
    statements.push(allow_if("TagWhatIsMade", &["ec2:CreateTags"], &changeable, &creating));
    if !kms_keys.is_empty() {
        let actions =
            ["kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncrypt*"];
        statements.push(allow("UseTheKeys", &actions, kms_keys));
        let by_aws = json!({ "Bool": { "kms:GrantIsForAWSResource": "true" } });
        statements.push(allow_if("LendTheKeysToEbs", &["kms:CreateGrant"], kms_keys, &by_aws));
    }
    json!({ "Version": "2012-10-17", "Statement": statements })
}

/// Returns the AWS partition of a region. Every ARN contains its partition.
fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// Returns the policy as text, to be pasted into IAM.
pub fn text(policy: &Value) -> String {
    serde_json::to_string_pretty(policy).expect("strings and lists")
}

/// Returns every action that the policy permits.
pub fn actions(access: DiskAccess) -> Vec<String> {
    let policy = policy(access, None, &[]);
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

    const ALL_ACCESS: [DiskAccess; 3] = [DiskAccess::Attached, DiskAccess::Direct, DiskAccess::Both];
    /// The statements without a condition. Of these statements, only `ThisInstance` permits changes to existing
    /// resources.
    const UNCONDITIONAL: &[&str] = &[
        "Look",
        "BaseParameters",
        "OfAnySnapshot",
        "VolumesOfAnySnapshot",
        "ThisInstance",
        "DirectLook",
        "DirectRead",
        "CopyAnySnapshot",
    ];

    #[test]
    fn changes_to_existing_resources_need_a_tag() {
        for access in ALL_ACCESS {
            let policy = policy(access, None, &[]);
            for statement in policy["Statement"].as_array().unwrap() {
                let sid = statement["Sid"].as_str().unwrap();
                assert_eq!(statement.get("Condition").is_none(), UNCONDITIONAL.contains(&sid), "{sid}");
                let all = statement["Resource"] == json!(["*"]);
                assert_eq!(all, ["Look", "DirectLook"].contains(&sid), "{sid}");
            }
            assert!(!text(&policy).contains("kms:"));
        }
        let key = "arn:aws:kms:eu-central-1:123456789012:key/k";
        let with_key = super::policy(DiskAccess::Both, None, &[key.to_owned()]);
        let of_keys =
            with_key["Statement"].as_array().unwrap().iter().filter(|s| s["Resource"] == json!([key]));
        assert_eq!(of_keys.count(), 2);
        assert!(text(&with_key).contains("kms:CreateGrant"));
    }

    #[test]
    fn arns_have_the_regions_partition() {
        let of = |region| text(&policy(DiskAccess::Both, Some(region), &[]));
        assert!(of("cn-north-1").contains("arn:aws-cn:ec2:") && !of("cn-north-1").contains("arn:aws:"));
        assert!(of("us-gov-east-1").contains("arn:aws-us-gov:ssm:"));
        assert_eq!(of("eu-central-1"), text(&policy(DiskAccess::Both, None, &[])));
    }

    /// IAM permits 6144 characters in a managed policy and 10240 in an inline policy. White space does not count (see
    /// IAM's quotas).
    #[test]
    fn it_fits_into_a_managed_policy() {
        assert!(policy(DiskAccess::Both, None, &[]).to_string().len() < 6144);
    }

    #[test]
    fn actions_have_no_wildcards() {
        assert!(actions(DiskAccess::Both).iter().all(|action| !action.contains('*')));
    }

    #[test]
    fn each_way_has_only_its_own_actions() {
        let of = |access| actions(access).into_iter().collect::<std::collections::BTreeSet<_>>();
        let (attached, direct) = (of(DiskAccess::Attached), of(DiskAccess::Direct));
        assert_eq!(&attached | &direct, of(DiskAccess::Both));
        assert!(!attached.iter().any(|action| action.starts_with("ebs:")));
        let volumes = ["AttachVolume", "CreateVolume", "CreateSnapshot", "DetachVolume", "DeleteVolume"];
        assert!(volumes.iter().all(|name| !direct.contains(&format!("ec2:{name}"))));
        assert!(!direct.contains("ec2:ModifyInstanceAttribute"));
    }
}
