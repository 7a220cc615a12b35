//! Classifies the errors of EC2: one table of error classes, and hints for the user on some of them.

/// How to handle a call that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// It did nothing because there were too many calls: retry later.
    Throttled,
    /// It did nothing, and a retry succeeds only after some seconds: retry after [`Pace::rate`](super::timeouts::Timeouts::rate).
    Paced,
    /// It did nothing: the credentials were too old, or could not be fetched. Load new ones.
    Expired,
    /// It is unknown whether it took effect. A call that may be sent twice is retried; any other is looked up.
    Lost,
    /// What it names is not visible yet, or not ready yet, if this process has created it. Nothing was done.
    NotYet,
    /// The requested state exists already.
    Done,
    /// It was refused, and a retry would be, too.
    Terminal,
}

/// An action of the API, and whether it may be sent twice.
#[derive(Debug, PartialEq, Eq)]
pub struct Action {
    pub name: &'static str,
    /// It has a client token, or a second call has no further effect: it is retried after a lost answer.
    pub twice: bool,
}

/// The actions of EBS direct.
pub const EBS_ACTIONS: &[&Action] =
    &[&LIST_SNAPSHOT_BLOCKS, &GET_SNAPSHOT_BLOCK, &START_SNAPSHOT, &PUT_SNAPSHOT_BLOCK, &COMPLETE_SNAPSHOT];

impl Action {
    /// The action's name in a policy.
    pub fn permission(&self) -> String {
        let service = match self {
            _ if EBS_ACTIONS.contains(&self) => "ebs",
            _ if *self == GET_PARAMETER => "ssm",
            _ => "ec2",
        };
        format!("{service}:{}", self.name)
    }
}

macro_rules! actions {
    ($($name:ident $text:literal $twice:literal,)*) => {
        $(pub const $name: Action = Action { name: $text, twice: $twice };)*
        /// Every action that oven sends.
        #[cfg(test)]
        pub const ACTIONS: &[&Action] = &[$(&$name),*];
    };
}
actions! {
    ATTACH_VOLUME "AttachVolume" false,
    COMPLETE_SNAPSHOT "CompleteSnapshot" false,
    COPY_SNAPSHOT "CopySnapshot" false,
    CREATE_SNAPSHOT "CreateSnapshot" false,
    CREATE_TAGS "CreateTags" true,
    CREATE_VOLUME "CreateVolume" true,
    DELETE_SNAPSHOT "DeleteSnapshot" true,
    DELETE_VOLUME "DeleteVolume" true,
    DEREGISTER_IMAGE "DeregisterImage" true,
    DESCRIBE_IMAGES "DescribeImages" true,
    DESCRIBE_INSTANCES "DescribeInstances" true,
    DESCRIBE_SNAPSHOTS "DescribeSnapshots" true,
    DESCRIBE_VOLUMES "DescribeVolumes" true,
    DETACH_VOLUME "DetachVolume" true,
    GET_EBS_ENCRYPTION_BY_DEFAULT "GetEbsEncryptionByDefault" true,
    GET_PARAMETER "GetParameter" true,
    GET_SNAPSHOT_BLOCK "GetSnapshotBlock" true,
    LIST_SNAPSHOT_BLOCKS "ListSnapshotBlocks" true,
    MODIFY_INSTANCE_ATTRIBUTE "ModifyInstanceAttribute" true,
    PUT_SNAPSHOT_BLOCK "PutSnapshotBlock" true,
    REGISTER_IMAGE "RegisterImage" false,
    START_SNAPSHOT "StartSnapshot" true,
}

const ANY: &str = "*";

/// Action, error code (`*` ends a prefix), a part of the message, class. The first row that matches decides; without a
/// row, the class is [`ErrorClass::Terminal`].
const TABLE: &[(&str, &str, &str, ErrorClass)] = &[
    // EC2 throttles each API by its own token bucket (EC2 API throttling).
    (ANY, "RequestLimitExceeded", "", ErrorClass::Throttled),
    (ANY, "EC2ThrottledException", "", ErrorClass::Throttled),
    (ANY, "Throttling*", "", ErrorClass::Throttled),
    (ANY, "RequestThrottled*", "", ErrorClass::Throttled),
    (ANY, "TooManyRequestsException", "", ErrorClass::Throttled),
    (ANY, "SlowDown", "", ErrorClass::Throttled),
    (ANY, "ConcurrentLimitExceededException", "", ErrorClass::Throttled),
    // The limits are one snapshot of a volume every 15 s, and five of them pending.
    ("CreateSnapshot", "SnapshotCreationPerVolumeRateExceeded", "", ErrorClass::Paced),
    ("CreateSnapshot", "ConcurrentSnapshotLimitExceeded", "", ErrorClass::Paced),
    (ANY, "ExpiredToken*", "", ErrorClass::Expired),
    // These are sent with the status 500 or 503.
    (ANY, "InternalError", "", ErrorClass::Lost),
    (ANY, "InternalFailure", "", ErrorClass::Lost),
    (ANY, "InternalServerError", "", ErrorClass::Lost),
    (ANY, "ServiceUnavailable*", "", ErrorClass::Lost),
    (ANY, "Unavailable", "", ErrorClass::Lost),
    (ANY, "RequestTimeout*", "", ErrorClass::Lost),
    (ANY, "InternalServerException", "", ErrorClass::Lost),
    // EBS direct: the data did not arrive completely, or an earlier call, whose answer was lost, is still being
    // processed. Any other ValidationException is final (error retries for EBS direct APIs).
    (ANY, "ValidationException", "failed to read block data", ErrorClass::Lost),
    ("PutSnapshotBlock", "ValidationException", "write_request_timeout", ErrorClass::Lost),
    ("PutSnapshotBlock", "ValidationException", "conflicting_block_update", ErrorClass::Lost),
    // The limit is 20 concurrent copies of snapshots in each region.
    ("CopySnapshot", "ResourceLimitExceeded", "", ErrorClass::Throttled),
    // It is gone, as it should be.
    ("DeleteVolume", "InvalidVolume.NotFound", "", ErrorClass::Done),
    ("DetachVolume", "InvalidVolume.NotFound", "", ErrorClass::Done),
    ("DetachVolume", "InvalidAttachment.NotFound", "", ErrorClass::Done),
    ("DetachVolume", "IncorrectState", "", ErrorClass::Done),
    ("DeleteSnapshot", "InvalidSnapshot.NotFound", "", ErrorClass::Done),
    ("DeregisterImage", "InvalidAMIID.NotFound", "", ErrorClass::Done),
    ("DeregisterImage", "InvalidAMIID.Unavailable", "", ErrorClass::Done),
    // New ids are not visible everywhere at once, and new resources are not ready at once.
    (ANY, "InvalidVolume.NotFound", "", ErrorClass::NotYet),
    (ANY, "InvalidSnapshot.NotFound", "", ErrorClass::NotYet),
    (ANY, "InvalidAMIID.NotFound", "", ErrorClass::NotYet),
    ("CreateTags", "InvalidID", "", ErrorClass::NotYet),
    (ANY, "ResourceNotFoundException", "snapshot", ErrorClass::NotYet),
    // The instance's view of its volumes is updated after the volume's own.
    ("ModifyInstanceAttribute", "InvalidInstanceAttributeValue", "mapped", ErrorClass::NotYet),
    (ANY, "IncorrectState", "pending", ErrorClass::NotYet),
    (ANY, "IncorrectState", "creating", ErrorClass::NotYet),
];

/// Whether a code matches a pattern of the tables.
fn matches_pattern(pattern: &str, code: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => code.starts_with(prefix),
        None => pattern == code,
    }
}

/// The class of an error. `status` is the HTTP status, if there was an answer at all.
pub fn classify(action: &str, code: Option<&str>, message: &str, status: Option<u16>) -> ErrorClass {
    let message = message.to_ascii_lowercase();
    let row = |code: &str| {
        let known = TABLE.iter().find(|(of, pattern, part, _)| {
            (*of == ANY || *of == action) && matches_pattern(pattern, code) && message.contains(part)
        });
        known.map(|(.., class)| *class)
    };
    match (code, status) {
        (Some(code), status) => row(code).unwrap_or(match status {
            Some(500..) => ErrorClass::Lost,
            _ => ErrorClass::Terminal,
        }),
        (None, Some(429)) => ErrorClass::Throttled,
        // An answer without a code: a proxy's 502, or half of a 200.
        (None, Some(400..500)) => ErrorClass::Terminal,
        (None, _) => ErrorClass::Lost,
    }
}

/// Error code (`*` ends a prefix), a part of the message in lower case, what the user can do.
const HINTS: &[(&str, &str, &str)] = &[
    ("*", "kms", KMS_HINT),
    ("AccessDenied*", "dependency_access_denied", KMS_HINT),
    ("UnauthorizedOperation", "", PERMIT_HINT),
    ("AccessDenied*", "", PERMIT_HINT),
    (
        "OptInRequired",
        "",
        "The account has not opted in to this region, or has not subscribed to the image. Do so in the AWS console.",
    ),
    (
        "AuthFailure",
        "",
        "The credentials are not valid here. Check them with `aws sts get-caller-identity`, and check this machine's \
         clock.",
    ),
    ("InvalidClientTokenId", "", "The access key does not exist, or belongs to another partition."),
    ("UnrecognizedClientException", "", "The access key does not exist, or belongs to another partition."),
    (
        "SignatureDoesNotMatch",
        "",
        "The secret key or this machine's clock is wrong. Check the clock with `timedatectl`.",
    ),
    (
        "ExpiredToken*",
        "",
        "Renew the credentials (such as by `aws sso login`), or bake on an instance with a role, whose keys AWS renews.",
    ),
    (
        "RequestLimitExceeded",
        "",
        "The account makes too many calls of this kind. Bake fewer images at a time (--jobs), or retry later.",
    ),
    ("RequestExpired", "", "This machine's clock is wrong. Check it with `timedatectl`."),
    (
        "VolumeLimitExceeded",
        "",
        "Raise the EBS quota `Storage for … volumes, in TiB` of this region, or delete volumes.",
    ),
    (
        "MaxIOPSLimitExceeded",
        "",
        "Raise the EBS quota `IOPS for Provisioned IOPS SSD … volumes` of this region.",
    ),
    (
        "InvalidSnapshot.NotFound",
        "",
        "Perhaps its owner shares the image, but not the snapshot. Copy the image into this account (aws ec2 \
         copy-image), and bake on the copy (owner = \"self\").",
    ),
    (
        "ServiceQuotaExceededException",
        "",
        "Raise the EBS quotas of pending snapshots and of EBS direct's requests, or bake fewer images at a time (--jobs).",
    ),
    ("SnapshotLimitExceeded", "", "Raise the EBS quota `Snapshots per Region`, or delete snapshots."),
    ("AMIQuotaExceeded", "", "Raise the EC2 quota `AMIs` of this region, or deregister images."),
    (
        "AttachmentLimitExceeded",
        "",
        "Detach a volume from this instance, or bake fewer images at a time (--jobs).",
    ),
    (
        "InsufficientVolumeCapacity",
        "",
        "EC2 has no capacity for this type of volume in the zone. Set another `type` in [disk], or bake in another zone.",
    ),
    ("InvalidZone.NotFound", "", "Check with `oven doctor` that this instance is in the configured region."),
    ("InvalidInstanceID*", "", "Check with `oven doctor` that this instance is in the configured region."),
    ("Blocked", "", "AWS blocked the account. Contact AWS Support."),
    ("PendingVerification", "", "AWS is still verifying the account. Wait for its e-mail."),
];
const PERMIT_HINT: &str = "Add the permission. `oven policy` prints the minimal policy, and `oven doctor` lists all \
                           missing permissions.";
/// The permissions that a volume needs if it is encrypted with a customer-managed key.
pub const KMS_HINT: &str = "Permit the role to use the KMS key: kms:DescribeKey, kms:CreateGrant, kms:Decrypt, \
                       kms:GenerateDataKeyWithoutPlaintext and kms:ReEncrypt* (`oven policy` has them).";

pub fn hint_for_code(code: &str, message: &str) -> Option<&'static str> {
    let message = message.to_ascii_lowercase();
    let kms = code.to_ascii_lowercase().contains("kms").then_some(KMS_HINT);
    let known =
        HINTS.iter().find(|(pattern, part, _)| matches_pattern(pattern, code) && message.contains(part));
    kms.or(known.map(|(.., hint)| *hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row of the fault matrix's table.
    #[test]
    fn classes() {
        use ErrorClass::*;
        for (action, code, message, status, class) in [
            ("DescribeImages", "RequestLimitExceeded", "", 503, Throttled),
            ("CreateVolume", "EC2ThrottledException", "", 400, Throttled),
            ("GetParameter", "ThrottlingException", "", 400, Throttled),
            ("GetParameter", "Throttling", "", 400, Throttled),
            ("CreateSnapshot", "RequestThrottledException", "", 400, Throttled),
            ("CreateSnapshot", "SlowDown", "", 503, Throttled),
            ("CreateSnapshot", "ConcurrentLimitExceededException", "", 400, Throttled),
            ("CreateSnapshot", "SnapshotCreationPerVolumeRateExceeded", "", 400, Paced),
            ("CreateSnapshot", "ConcurrentSnapshotLimitExceeded", "", 400, Paced),
            ("DescribeImages", "ExpiredToken", "", 400, Expired),
            ("GetParameter", "ExpiredTokenException", "", 400, Expired),
            ("CreateSnapshot", "InternalError", "", 500, Lost),
            ("CreateSnapshot", "Unavailable", "", 503, Lost),
            ("CreateSnapshot", "ServiceUnavailable", "", 503, Lost),
            ("CreateSnapshot", "Whatever", "", 500, Lost),
            ("RegisterImage", "RequestTimeout", "", 400, Lost),
            ("DescribeVolumes", "InvalidVolume.NotFound", "", 400, NotYet),
            ("DescribeSnapshots", "InvalidSnapshot.NotFound", "", 400, NotYet),
            ("DescribeImages", "InvalidAMIID.NotFound", "", 400, NotYet),
            ("RegisterImage", "IncorrectState", "snap-1 is in invalid state - Pending", 400, NotYet),
            ("AttachVolume", "IncorrectState", "vol-1 is creating", 400, NotYet),
            ("AttachVolume", "IncorrectState", "Instance is not running", 400, Terminal),
            (
                "ModifyInstanceAttribute",
                "InvalidInstanceAttributeValue",
                "No device is currently mapped at /dev/sdf",
                400,
                NotYet,
            ),
            ("DeleteVolume", "InvalidVolume.NotFound", "", 400, Done),
            ("DetachVolume", "IncorrectState", "vol-1 is in the 'available' state", 400, Done),
            ("DetachVolume", "InvalidAttachment.NotFound", "", 400, Done),
            ("DetachVolume", "InvalidVolume.NotFound", "", 400, Done),
            ("DeleteSnapshot", "InvalidSnapshot.NotFound", "", 400, Done),
            ("DeregisterImage", "InvalidAMIID.NotFound", "", 400, Done),
            ("DeleteVolume", "VolumeInUse", "", 400, Terminal),
            ("DeleteSnapshot", "InvalidSnapshot.InUse", "", 400, Terminal),
            ("RegisterImage", "InvalidAMIName.Duplicate", "", 400, Terminal),
            ("CreateVolume", "UnauthorizedOperation", "", 403, Terminal),
            ("CreateVolume", "AuthFailure", "", 401, Terminal),
            ("CreateVolume", "InvalidParameterValue", "", 400, Terminal),
            ("CreateVolume", "VolumeLimitExceeded", "", 400, Terminal),
            ("CreateSnapshot", "SnapshotLimitExceeded", "", 400, Terminal),
            ("CreateVolume", "OptInRequired", "", 400, Terminal),
            ("CreateVolume", "IdempotentParameterMismatch", "", 400, Terminal),
            ("CreateVolume", "ConflictException", "", 409, Terminal),
            ("GetParameter", "ValidationException", "", 400, Terminal),
            ("CreateVolume", "ResourceLimitExceeded", "", 400, Terminal),
            ("CopySnapshot", "ResourceLimitExceeded", "Too many snapshot copies in progress", 400, Throttled),
            ("PutSnapshotBlock", "RequestThrottledException", "", 400, Throttled),
            ("PutSnapshotBlock", "ThrottlingException", "", 400, Throttled),
            ("GetSnapshotBlock", "ConcurrentLimitExceededException", "", 400, Throttled),
            ("PutSnapshotBlock", "ValidationException", "Failed to read block data", 400, Lost),
            ("PutSnapshotBlock", "ValidationException", " CONFLICTING_BLOCK_UPDATE", 400, Lost),
            ("PutSnapshotBlock", "ValidationException", "INVALID_PARAMETER_VALUE", 400, Terminal),
            ("CompleteSnapshot", "ValidationException", "the checksum does not match", 400, Terminal),
            ("GetSnapshotBlock", "ValidationException", "INVALID_BLOCK_TOKEN", 400, Terminal),
            ("PutSnapshotBlock", "InternalServerException", "", 500, Lost),
            ("PutSnapshotBlock", "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND", 404, NotYet),
            ("PutSnapshotBlock", "ServiceQuotaExceededException", "", 402, Terminal),
            ("StartSnapshot", "ConflictException", "", 409, Terminal),
            ("GetSnapshotBlock", "AccessDeniedException", "", 403, Terminal),
        ] {
            assert_eq!(
                classify(action, Some(code), message, Some(status)),
                class,
                "{action} {code} {message}"
            );
        }
        for (status, class) in [
            (None, Lost),
            (Some(200), Lost),
            (Some(502), Lost),
            (Some(503), Lost),
            (Some(429), Throttled),
            (Some(404), Terminal),
        ] {
            assert_eq!(classify("CreateSnapshot", None, "", status), class, "{status:?}");
        }
    }

    #[test]
    fn calls_without_a_token_are_sent_once() {
        let once: Vec<&str> =
            ACTIONS.iter().filter(|action| !action.twice).map(|action| action.name).collect();
        assert_eq!(
            once,
            ["AttachVolume", "CompleteSnapshot", "CopySnapshot", "CreateSnapshot", "RegisterImage"]
        );
    }

    #[test]
    fn hints() {
        let hint_contains =
            |code, message, part| hint_for_code(code, message).is_some_and(|hint| hint.contains(part));
        assert!(hint_contains("UnauthorizedOperation", "", "oven policy"));
        assert!(hint_contains("InvalidParameterValue", "The KMS key is disabled", "kms:CreateGrant"));
        assert!(hint_contains("KMSKeyNotAccessibleFault", "", "kms:CreateGrant"));
        assert!(hint_contains("AccessDeniedException", "no DEPENDENCY_ACCESS_DENIED", "kms:Decrypt"));
        assert!(hint_contains("AccessDeniedException", "no", "oven policy"));
        assert!(hint_contains("VolumeLimitExceeded", "", "quota"));
        assert!(hint_contains("InvalidSnapshot.NotFound", "", "copy-image"));
        assert!(hint_contains("RequestExpired", "", "clock"));
        assert_eq!(hint_for_code("InvalidParameterValue", "no"), None);
    }
}
