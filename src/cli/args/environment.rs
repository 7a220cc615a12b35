//! The environment variables that oven reads. The reference page and `oven --help` list them.

/// Environment variables with one meaning.
pub struct EnvironmentVariables {
    pub names: &'static [&'static str],
    /// The flag that overrides the variable.
    pub flag: Option<&'static str>,
    pub meaning: &'static str,
}

pub const ENVIRONMENT: &[EnvironmentVariables] = &[
    EnvironmentVariables {
        names: &["OVEN_CLOUD"],
        flag: Some("--cloud"),
        meaning: "the cloud: `local` (default) or `aws`",
    },
    EnvironmentVariables {
        names: &["OVEN_REGION"],
        flag: Some("--region"),
        meaning: "the region's name, such as `eu-central-1`",
    },
    EnvironmentVariables {
        names: &["OVEN_REGION_DIR"],
        flag: Some("--region-dir"),
        meaning: "the directory of the local region; default `/var/lib/oven/region`",
    },
    EnvironmentVariables {
        names: &["OVEN_INSTANCE_ID"],
        flag: Some("--instance-id"),
        meaning: "the builder's instance id, needed if the metadata service is not reachable",
    },
    EnvironmentVariables {
        names: &["OVEN_ZONE"],
        flag: Some("--zone"),
        meaning: "the builder's availability zone, needed if the metadata service is not reachable",
    },
    EnvironmentVariables {
        names: &["OVEN_DISKS"],
        flag: Some("--disks"),
        meaning: "how a bake accesses its disk: `attached` (default) or `direct`",
    },
    EnvironmentVariables {
        names: &["CI"],
        flag: None,
        meaning: "if it has a value other than `false` or `0`, oven passes on only the secrets that `--secret` names",
    },
    EnvironmentVariables {
        names: &["NO_COLOR"],
        flag: Some("--color"),
        meaning: "if it has any value, oven prints no colours",
    },
    EnvironmentVariables {
        names: &["CLICOLOR_FORCE"],
        flag: Some("--color"),
        meaning: "if it has a value other than `0`, oven prints colours even if standard error is not a terminal, unless \
                  `NO_COLOR` is set",
    },
    EnvironmentVariables {
        names: &["TERM"],
        flag: Some("--progress"),
        meaning: "if it is `dumb` or not set, oven prints plain lines without animation. `oven shell` passes it to the \
                  shell",
    },
    EnvironmentVariables {
        names: &["COLUMNS"],
        flag: None,
        meaning: "the width of help texts if standard output is not a terminal; at most 80",
    },
    EnvironmentVariables {
        names: &["TMPDIR"],
        flag: None,
        meaning: "the directory for the copy of a disk that `oven import -` reads from a pipe; default `/var/tmp`. The \
                  copy has no name. In a container, oven also makes device nodes in this directory",
    },
    EnvironmentVariables {
        names: &["SSL_CERT_FILE"],
        flag: None,
        meaning: "certificates for downloads of package files by URL, used instead of this machine's certificates",
    },
    EnvironmentVariables {
        names: &["SUDO_UID"],
        flag: None,
        meaning: "the user who called sudo. oven accepts an `oven.toml`, state directories and an older trace that belong \
                  to this user",
    },
    EnvironmentVariables {
        names: &["AWS_REGION", "AWS_DEFAULT_REGION"],
        flag: Some("--region"),
        meaning: "in AWS, the region if no setting names one. With attached disks it has to be the builder's region",
    },
    EnvironmentVariables {
        names: &["AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HOME"],
        flag: None,
        meaning: "in AWS, the profile, and the files with profiles and credentials; default `~/.aws/config` and \
                  `~/.aws/credentials`",
    },
    EnvironmentVariables {
        names: &["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"],
        flag: None,
        meaning: "in AWS, the credentials",
    },
    EnvironmentVariables {
        names: &["AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE"],
        flag: None,
        meaning: "in AWS, credentials by a web identity",
    },
    EnvironmentVariables {
        names: &[
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        ],
        flag: None,
        meaning: "in AWS, credentials of a container; ECS and EKS set these variables",
    },
    EnvironmentVariables {
        names: &["AWS_ENDPOINT_URL", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"],
        flag: None,
        meaning: "in AWS, an endpoint to use instead of Amazon's, and the kind of endpoint",
    },
    EnvironmentVariables {
        names: &["AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"],
        flag: None,
        meaning: "in AWS, the address of the metadata service; the mode is `IPv6` in a subnet that has only IPv6",
    },
];

/// The width of the list in `oven --help`.
const WIDTH: usize = 78;

/// Returns the list for `oven --help`.
pub fn list() -> String {
    let mut lines = vec!["Environment variables:".to_owned(), " ".to_owned()];
    let names: Vec<_> = ENVIRONMENT.iter().flat_map(|row| row.names).collect();
    for (index, name) in names.iter().enumerate() {
        let end = if index + 1 < names.len() { "," } else { "" };
        let line = lines.last_mut().expect("the list is not empty");
        if line.len() + name.len() + 2 > WIDTH {
            lines.push(format!("  {name}{end}"));
        } else {
            line.push_str(&format!(" {name}{end}"));
        }
    }
    lines.push("docs/reference/environment.md explains them.".to_owned());
    lines.join("\n")
}
