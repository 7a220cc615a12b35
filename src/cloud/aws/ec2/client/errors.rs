//! Classifies the errors of EC2 with one table. A second table has hints for the user.

/// How to handle a call that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The call had no effect, because there were too many calls. It is retried later.
    Throttled,
    /// The call had no effect, and a retry can succeed only after some seconds. It is retried after
    /// [`Timeouts::rate`](super::timeouts::Timeouts::rate).
    RateLimited,
    /// The call had no effect, because the credentials have expired, are missing, or could not be fetched. The
    /// credentials are loaded again, and the call is retried.
    CredentialsExpired,
    /// It is unknown whether the call had an effect. An idempotent call is retried. After any other call, oven looks up
    /// whether the call had an effect.
    Ambiguous,
    /// The call had no effect, because one of its objects was not found or is not ready. If the object was not found,
    /// the call is retried only if this process has just created it. In EC2's API, a call is also retried if the object
    /// exists but is not ready.
    NotVisibleYet,
    /// The requested state exists already.
    AlreadyDone,
    /// The call was refused, and a retry would be refused again.
    Fatal,
}

/// An action of the API.
#[derive(Debug, PartialEq, Eq)]
pub struct Action {
    pub name: &'static str,
    /// Whether sending the call twice has the same effect as sending it once, for example because the call has a client
    /// token. An idempotent call is retried after a lost answer.
    pub idempotent: bool,
}

/// The actions of EBS direct, which is the API for blocks of snapshots.
pub const EBS_ACTIONS: &[&Action] =
    &[&LIST_SNAPSHOT_BLOCKS, &GET_SNAPSHOT_BLOCK, &START_SNAPSHOT, &PUT_SNAPSHOT_BLOCK, &COMPLETE_SNAPSHOT];

impl Action {
    /// Returns the action's name in an IAM policy.
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
        $(pub const $name: Action = Action { name: $text, idempotent: $twice };)*
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

/// The columns are: action, error code (a prefix if it ends in `*`), a part of the message in lower case, class. The
/// first row that matches decides. If no row matches an error code, the class is [`ErrorClass::Ambiguous`] for an HTTP
/// status of at least 500, and [`ErrorClass::Fatal`] otherwise.
const TABLE: &[(&str, &str, &str, ErrorClass)] = &[
    // These codes mean that an action was called too often. EC2 has a separate token bucket for each action (see "EC2
    // API throttling" in AWS's documentation).
    (ANY, "RequestLimitExceeded", "", ErrorClass::Throttled),
    (ANY, "EC2ThrottledException", "", ErrorClass::Throttled),
    (ANY, "Throttling*", "", ErrorClass::Throttled),
    (ANY, "RequestThrottled*", "", ErrorClass::Throttled),
    (ANY, "TooManyRequestsException", "", ErrorClass::Throttled),
    (ANY, "SlowDown", "", ErrorClass::Throttled),
    (ANY, "ConcurrentLimitExceededException", "", ErrorClass::Throttled),
    // EC2 creates at most one snapshot of a volume in 15 s, and permits at most five pending snapshots of a volume.
    ("CreateSnapshot", "SnapshotCreationPerVolumeRateExceeded", "", ErrorClass::RateLimited),
    ("CreateSnapshot", "ConcurrentSnapshotLimitExceeded", "", ErrorClass::RateLimited),
    (ANY, "ExpiredToken*", "", ErrorClass::CredentialsExpired),
    // A call that failed with one of these codes may have had an effect.
    (ANY, "InternalError", "", ErrorClass::Ambiguous),
    (ANY, "InternalFailure", "", ErrorClass::Ambiguous),
    (ANY, "InternalServerError", "", ErrorClass::Ambiguous),
    (ANY, "ServiceUnavailable*", "", ErrorClass::Ambiguous),
    (ANY, "Unavailable", "", ErrorClass::Ambiguous),
    (ANY, "RequestTimeout*", "", ErrorClass::Ambiguous),
    (ANY, "InternalServerException", "", ErrorClass::Ambiguous),
    // EBS direct returns these errors if the data did not arrive completely, or if an earlier call with a lost answer
    // is still being processed. After any other ValidationException, the call is not retried (see "error retries" in
    // the documentation of the EBS direct APIs).
    (ANY, "ValidationException", "failed to read block data", ErrorClass::Ambiguous),
    ("PutSnapshotBlock", "ValidationException", "write_request_timeout", ErrorClass::Ambiguous),
    ("PutSnapshotBlock", "ValidationException", "conflicting_block_update", ErrorClass::Ambiguous),
    // EC2 permits at most 20 concurrent copies of snapshots in a region.
    ("CopySnapshot", "ResourceLimitExceeded", "", ErrorClass::Throttled),
    // The object is already deleted, detached or deregistered.
    ("DeleteVolume", "InvalidVolume.NotFound", "", ErrorClass::AlreadyDone),
    ("DetachVolume", "InvalidVolume.NotFound", "", ErrorClass::AlreadyDone),
    ("DetachVolume", "InvalidAttachment.NotFound", "", ErrorClass::AlreadyDone),
    ("DetachVolume", "IncorrectState", "", ErrorClass::AlreadyDone),
    ("DeleteSnapshot", "InvalidSnapshot.NotFound", "", ErrorClass::AlreadyDone),
    ("DeregisterImage", "InvalidAMIID.NotFound", "", ErrorClass::AlreadyDone),
    ("DeregisterImage", "InvalidAMIID.Unavailable", "", ErrorClass::AlreadyDone),
    // A new id is not visible everywhere immediately, and a new resource is not ready immediately.
    (ANY, "InvalidVolume.NotFound", "", ErrorClass::NotVisibleYet),
    (ANY, "InvalidSnapshot.NotFound", "", ErrorClass::NotVisibleYet),
    (ANY, "InvalidAMIID.NotFound", "", ErrorClass::NotVisibleYet),
    ("CreateTags", "InvalidID", "", ErrorClass::NotVisibleYet),
    (ANY, "ResourceNotFoundException", "snapshot", ErrorClass::NotVisibleYet),
    // After EC2 attaches a volume, it updates the volume's description first, and the instance's description later.
    // Until then, ModifyInstanceAttribute returns this error.
    ("ModifyInstanceAttribute", "InvalidInstanceAttributeValue", "mapped", ErrorClass::NotVisibleYet),
    (ANY, "IncorrectState", "pending", ErrorClass::NotVisibleYet),
    (ANY, "IncorrectState", "creating", ErrorClass::NotVisibleYet),
];

/// Returns whether an error code matches the pattern in a row of the tables.
fn matches_pattern(pattern: &str, code: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => code.starts_with(prefix),
        None => pattern == code,
    }
}

/// Returns the class of an error. `status` is the HTTP status; `None` if there was no answer.
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
            Some(500..) => ErrorClass::Ambiguous,
            _ => ErrorClass::Fatal,
        }),
        (None, Some(429)) => ErrorClass::Throttled,
        // An answer without a code came from a proxy, or was cut off.
        (None, Some(400..500)) => ErrorClass::Fatal,
        (None, _) => ErrorClass::Ambiguous,
    }
}

/// The columns are: error code (a prefix if it ends in `*`), a part of the message in lower case, hint.
const HINTS: &[(&str, &str, &str)] = &[
    ("*", "kms", KMS_HINT),
    ("AccessDenied*", "dependency_access_denied", KMS_HINT),
    ("UnauthorizedOperation", "", PERMIT_HINT),
    ("AccessDenied*", "", PERMIT_HINT),
    (
        "OptInRequired",
        "",
        "Enable this region for the account. If the image is from AWS Marketplace, subscribe to it.",
    ),
    (
        "AuthFailure",
        "",
        "EC2 in this region rejects the credentials. Check them with `aws sts get-caller-identity`, and check this \
         machine's clock.",
    ),
    (
        "InvalidClientTokenId",
        "",
        "The access key does not exist, or belongs to another AWS partition (such as China).",
    ),
    (
        "UnrecognizedClientException",
        "",
        "The access key does not exist, or belongs to another AWS partition (such as China).",
    ),
    (
        "SignatureDoesNotMatch",
        "",
        "The secret key or this machine's clock is wrong. Check the clock with `timedatectl`.",
    ),
    (
        "ExpiredToken*",
        "",
        "Renew the credentials, for example with `aws sso login`. AWS renews the credentials of an \
         instance's role automatically.",
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
        "Perhaps the base image is shared with this account, but its snapshot is not. Copy the image into this \
         account (aws ec2 copy-image), and bake on the copy (owner = \"self\").",
    ),
    (
        "ServiceQuotaExceededException",
        "",
        "Raise the EBS quotas for pending snapshots and for requests to EBS direct, or bake \
         fewer images at a time (--jobs).",
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
    ("PendingVerification", "", "AWS is still verifying the account. Wait for the e-mail from AWS."),
];
const PERMIT_HINT: &str = "Add the permission. `oven policy` prints the minimal policy, and `oven doctor` lists all \
                           missing permissions.";
/// Lists the permissions that the role needs for a volume that is encrypted with a customer-managed key.
pub const KMS_HINT: &str = "Permit the role to use the KMS key: kms:DescribeKey, kms:CreateGrant, kms:Decrypt, \
                       kms:GenerateDataKeyWithoutPlaintext and kms:ReEncrypt* (`oven policy` prints them).";

pub fn hint_for_code(code: &str, message: &str) -> Option<&'static str> {
    let message = message.to_ascii_lowercase();
    let kms = code.to_ascii_lowercase().contains("kms").then_some(KMS_HINT);
    let known =
        HINTS.iter().find(|(pattern, part, _)| matches_pattern(pattern, code) && message.contains(part));
    kms.or(known.map(|(.., hint)| *hint))
}

/// Texts of the SDK that say only that something went wrong.
const UNINFORMATIVE: [&str; 5] =
    ["dispatch failure", "io error", "other", "service error", "unhandled error"];

/// The SDK says this about each provider of credentials that it tried, before the reason.
const NOT_ENABLED: &str = "the credential provider was not enabled";

/// Returns the error and its causes in one line, without the texts in [`UNINFORMATIVE`].
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = in_one_line(&error.to_string());
        // Some errors already include the text of their cause.
        if !UNINFORMATIVE.contains(&text.as_str()) && !causes.last().is_some_and(|last| last.contains(&text))
        {
            causes.push(text);
        }
        cause = error.source();
    }
    if causes.is_empty() { in_one_line(&error.to_string()) } else { causes.join(": ") }
}

/// Joins the lines of a text of the SDK. If the SDK finds no credentials, each line is about one provider.
fn in_one_line(text: &str) -> String {
    let text = text.trim_start_matches(NOT_ENABLED).trim_start_matches(": ");
    let mut lines = text.lines().map(|line| line.replace(&format!(": {NOT_ENABLED}"), "").trim().to_owned());
    let first = lines.next().unwrap_or_default();
    let rest: Vec<_> = lines.collect();
    if rest.is_empty() { first } else { format!("{first} {}", rest.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests every class. The HTTP status decides only if no row matches.
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
            ("CreateSnapshot", "SnapshotCreationPerVolumeRateExceeded", "", 400, RateLimited),
            ("CreateSnapshot", "ConcurrentSnapshotLimitExceeded", "", 400, RateLimited),
            ("DescribeImages", "ExpiredToken", "", 400, CredentialsExpired),
            ("GetParameter", "ExpiredTokenException", "", 400, CredentialsExpired),
            ("CreateSnapshot", "InternalError", "", 500, Ambiguous),
            ("CreateSnapshot", "Unavailable", "", 503, Ambiguous),
            ("CreateSnapshot", "ServiceUnavailable", "", 503, Ambiguous),
            ("CreateSnapshot", "Whatever", "", 500, Ambiguous),
            ("RegisterImage", "RequestTimeout", "", 400, Ambiguous),
            ("DescribeVolumes", "InvalidVolume.NotFound", "", 400, NotVisibleYet),
            ("DescribeSnapshots", "InvalidSnapshot.NotFound", "", 400, NotVisibleYet),
            ("DescribeImages", "InvalidAMIID.NotFound", "", 400, NotVisibleYet),
            ("RegisterImage", "IncorrectState", "snap-1 is in invalid state - Pending", 400, NotVisibleYet),
            ("AttachVolume", "IncorrectState", "vol-1 is creating", 400, NotVisibleYet),
            ("AttachVolume", "IncorrectState", "Instance is not running", 400, Fatal),
            (
                "ModifyInstanceAttribute",
                "InvalidInstanceAttributeValue",
                "No device is currently mapped at /dev/sdf",
                400,
                NotVisibleYet,
            ),
            ("DeleteVolume", "InvalidVolume.NotFound", "", 400, AlreadyDone),
            ("DetachVolume", "IncorrectState", "vol-1 is in the 'available' state", 400, AlreadyDone),
            ("DetachVolume", "InvalidAttachment.NotFound", "", 400, AlreadyDone),
            ("DetachVolume", "InvalidVolume.NotFound", "", 400, AlreadyDone),
            ("DeleteSnapshot", "InvalidSnapshot.NotFound", "", 400, AlreadyDone),
            ("DeregisterImage", "InvalidAMIID.NotFound", "", 400, AlreadyDone),
            ("DeleteVolume", "VolumeInUse", "", 400, Fatal),
            ("DeleteSnapshot", "InvalidSnapshot.InUse", "", 400, Fatal),
            ("RegisterImage", "InvalidAMIName.Duplicate", "", 400, Fatal),
            ("CreateVolume", "UnauthorizedOperation", "", 403, Fatal),
            ("CreateVolume", "AuthFailure", "", 401, Fatal),
            ("CreateVolume", "InvalidParameterValue", "", 400, Fatal),
            ("CreateVolume", "VolumeLimitExceeded", "", 400, Fatal),
            ("CreateSnapshot", "SnapshotLimitExceeded", "", 400, Fatal),
            ("CreateVolume", "OptInRequired", "", 400, Fatal),
            ("CreateVolume", "IdempotentParameterMismatch", "", 400, Fatal),
            ("CreateVolume", "ConflictException", "", 409, Fatal),
            ("GetParameter", "ValidationException", "", 400, Fatal),
            ("CreateVolume", "ResourceLimitExceeded", "", 400, Fatal),
            ("CopySnapshot", "ResourceLimitExceeded", "Too many snapshot copies in progress", 400, Throttled),
            ("PutSnapshotBlock", "RequestThrottledException", "", 400, Throttled),
            ("PutSnapshotBlock", "ThrottlingException", "", 400, Throttled),
            ("GetSnapshotBlock", "ConcurrentLimitExceededException", "", 400, Throttled),
            ("PutSnapshotBlock", "ValidationException", "Failed to read block data", 400, Ambiguous),
            ("PutSnapshotBlock", "ValidationException", " CONFLICTING_BLOCK_UPDATE", 400, Ambiguous),
            ("PutSnapshotBlock", "ValidationException", "INVALID_PARAMETER_VALUE", 400, Fatal),
            ("CompleteSnapshot", "ValidationException", "the checksum does not match", 400, Fatal),
            ("GetSnapshotBlock", "ValidationException", "INVALID_BLOCK_TOKEN", 400, Fatal),
            ("PutSnapshotBlock", "InternalServerException", "", 500, Ambiguous),
            ("PutSnapshotBlock", "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND", 404, NotVisibleYet),
            ("PutSnapshotBlock", "ServiceQuotaExceededException", "", 402, Fatal),
            ("StartSnapshot", "ConflictException", "", 409, Fatal),
            ("GetSnapshotBlock", "AccessDeniedException", "", 403, Fatal),
        ] {
            assert_eq!(
                classify(action, Some(code), message, Some(status)),
                class,
                "{action} {code} {message}"
            );
        }
        for (status, class) in [
            (None, Ambiguous),
            (Some(200), Ambiguous),
            (Some(502), Ambiguous),
            (Some(503), Ambiguous),
            (Some(429), Throttled),
            (Some(404), Fatal),
        ] {
            assert_eq!(classify("CreateSnapshot", None, "", status), class, "{status:?}");
        }
    }

    #[test]
    fn calls_without_a_token_are_sent_once() {
        let once: Vec<&str> =
            ACTIONS.iter().filter(|action| !action.idempotent).map(|action| action.name).collect();
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

    #[test]
    fn the_providers_that_have_no_credentials_are_listed_in_one_line() {
        let text = "the credential provider was not enabled: no credentials found in chain. Attempted:\n  \
                    Environment: the credential provider was not enabled: environment variable not set\n  \
                    Profile: the credential provider was not enabled";
        assert_eq!(
            in_one_line(text),
            "no credentials found in chain. Attempted: Environment: environment variable not set; Profile"
        );
        assert_eq!(in_one_line("connection refused"), "connection refused");
    }
}
