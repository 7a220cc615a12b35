//! The keys for packages and for their repositories.

use super::SOURCE;
use crate::config::key_table::{
    ANY_TEXT, ArrayRule, DefaultValue, KEY, KeyRule, Literal, NO, Section, TextRule, TomlKey, ValueType, text,
};

macro_rules! package {
    () => {
        "[A-Za-z0-9]([A-Za-z0-9+._-]*[A-Za-z0-9+._])?(:[a-z0-9][a-z0-9-]*)?"
    };
}

const URL: ValueType = text(
    r"^https?://[!#%&()*+,.0-9=?A-Z\[\]_a-z~-][!#%&()*+,.0-9:=?A-Z\[\]_a-z~-]*(/[!#%&()*+,./0-9:=?@A-Z\[\]_a-z~-]*)?$",
);

pub(super) const PACKAGES: TomlKey = TomlKey {
    name: "packages",
    value: ValueType::Array(&ArrayRule {
        element: ValueType::Either(&[
            ValueType::Text(TextRule {
                // A file, a group, or a name with or without a suite and a version.
                pattern: concat!(
                    r"^(\.\.?/.*|[^/]+/.*\.(deb|rpm)|@\^?[A-Za-z0-9]([A-Za-z0-9+._:() -]*[A-Za-z0-9+._:()-])?|",
                    package!(),
                    "(/[A-Za-z0-9][A-Za-z0-9._+~-]*)?(=[A-Za-z0-9*][A-Za-z0-9.+~:^_*-]*)?)$"
                ),
                never: r"://|^[^/@]*\.(deb|rpm)$",
                ..ANY_TEXT
            }),
            ValueType::Table(&BY_URL),
        ]),
        first: None,
        least: 0,
        unique: true,
    }),
    expected: "an array of packages, such as [\"nginx-light\", \"redis-server=5:7.0.*\", \"./site.deb\"]",
    doc: "The packages to install, together with their dependencies. Each is one of these:\n\n- `\"name\"`, or \
          `\"name:arch\"` for another architecture\n- `\"name=version\"`; an epoch is part of the version, and `*` \
          stands for any number of characters\n- `\"name/suite\"` or `\"name/suite=version\"`, with apt: the newest \
          package of this suite, or this version; new dependencies come from it, too\n- `\"@group\"`, with dnf and \
          zypper\n- `\"./x.deb\"` or `\"./x.rpm\"`, a package file in the definition\n- `{ url = \"https://…\", sha256 = \"…\" }`, a package file that oven \
          downloads\n\nAfterwards oven checks that they are installed.",
    example: "packages = [\"nginx-light\", \"redis-server=5:7.0.*\", \"./site_1.0_all.deb\"]",
    ..KEY
};

static BY_URL: Section = Section {
    header: "`packages`",
    keys: &[
        TomlKey {
            name: "url",
            value: URL,
            expected: "a URL, such as \"https://example.org/site.deb\"",
            required: Some("the URL of the package file, such as \"https://example.org/site.deb\""),
            doc: "The URL of the package file, with `http` or `https`. The file is downloaded before the bake, with \
                  the `proxy` and the `ca_file` that `[network]` of oven.toml sets. The file is cached in `downloads` \
                  of the region's directory (in AWS: `/var/lib/oven/downloads`). You can remove cached files while no \
                  bake runs. The URL cannot contain a password, because it is written to logs.",
            example: "packages = [{ url = \"https://example.org/site.deb\", sha256 = \
                      \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\" }]",
            ..KEY
        },
        TomlKey {
            name: "sha256",
            value: text("^[0-9A-Fa-f]{64}$"),
            expected: "64 hexadecimal digits, as `sha256sum` prints them",
            required: Some(
                "64 hexadecimal digits, as `sha256sum` prints them. oven installs only a file with this digest",
            ),
            doc: "The SHA-256 digest of the file. A file with another digest is not installed.",
            example: "packages = [{ url = \"https://example.org/site.deb\", sha256 = \
                      \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\" }]",
            ..KEY
        },
    ],
    rules: &[],
};

pub(super) const UPGRADE: TomlKey = TomlKey {
    name: "upgrade",
    value: ValueType::Either(&[ValueType::Boolean, ValueType::Words(&["security"])]),
    expected: "`true` (all packages), `false` or \"security\" (only security updates)",
    default: NO,
    doc: "Whether installed packages are upgraded first. `true` upgrades all of them. `\"security\"` upgrades only to \
          versions of the security suites.",
    example: "upgrade = \"security\"",
    ..KEY
};

pub(super) const RECOMMENDS: TomlKey = TomlKey {
    name: "recommends",
    value: ValueType::Boolean,
    default: NO,
    doc: "Whether recommended packages are also installed.",
    example: "recommends = true",
    ..KEY
};

pub(super) const REPOSITORY: TomlKey = TomlKey {
    name: "repository",
    value: ValueType::Tables(&REPOSITORIES),
    doc: "A package repository in addition to the image's own. Each repository has its own `[[repository]]`.",
    example: "[[repository]]\nname = \"docker\"\nurl = \"https://download.docker.com/linux/debian\"\n\
              key = \"keys/docker.asc\"\nsuite = \"bookworm\"\ncomponents = [\"stable\"]",
    ..KEY
};

static REPOSITORIES: Section = Section {
    header: "[[repository]]",
    keys: &[
        TomlKey {
            name: "name",
            value: ValueType::Text(TextRule {
                pattern: "^[A-Za-z0-9][A-Za-z0-9._-]*$",
                most: crate::definition::repositories::MAX_NAME,
                ..ANY_TEXT
            }),
            expected: "a name, such as \"docker\"",
            required: Some("a name, such as \"docker\""),
            doc: "The name of the repository, and of the file in the image that lists it.",
            example: "name = \"docker\"",
            ..KEY
        },
        TomlKey {
            name: "url",
            value: URL,
            expected: "the repository's address, such as \"https://repo.example/debian\"",
            required: Some("the repository's address, such as \"https://repo.example/debian\""),
            doc: "The address of the repository, with `http` or `https`. It must be complete: an address with a part \
                  that only a running instance can replace (`REGION`, `$awsregion`) does not work in a bake.",
            example: "url = \"https://download.docker.com/linux/debian\"",
            ..KEY
        },
        TomlKey {
            name: "key",
            value: SOURCE,
            expected: "a file with the repository's OpenPGP key, such as \"keys/docker.asc\"",
            default: DefaultValue::None,
            doc: "A file in the definition: the OpenPGP key that signs the repository, ASCII-armoured. It is \
                  required, unless `signed = false`.",
            example: "key = \"keys/docker.asc\"",
            ..KEY
        },
        TomlKey {
            name: "signed",
            value: ValueType::Boolean,
            default: DefaultValue::Is(Literal::Boolean(true)),
            doc: "Whether the repository is signed. `false` accepts packages without a signature. In that case `key` \
                  cannot be set.",
            example: "signed = false",
            ..KEY
        },
        TomlKey {
            name: "suite",
            value: ValueType::Text(TextRule {
                pattern: "^[A-Za-z0-9_.+~-][A-Za-z0-9_./+~-]*$",
                never: r"(^|/)\.\.(/|$)",
                ..ANY_TEXT
            }),
            expected: "a suite's name, such as \"bookworm\"",
            doc: "The suite of an apt repository. A flat repository has no suite.",
            example: "suite = \"bookworm\"",
            ..KEY
        },
        TomlKey {
            name: "components",
            value: ValueType::Array(&ArrayRule {
                element: text("^[A-Za-z0-9][A-Za-z0-9_./+-]*$"),
                first: None,
                least: 0,
                unique: false,
            }),
            expected: "an array of components, such as [\"main\"]",
            doc: "The components of an apt repository's suite. A flat repository has no components.",
            example: "components = [\"main\", \"contrib\"]",
            ..KEY
        },
        TomlKey {
            name: "keep",
            value: ValueType::Boolean,
            default: DefaultValue::Is(Literal::Boolean(true)),
            doc: "Whether the repository stays in the image. With `false`, only this bake uses the repository. (An \
                  OpenPGP key that rpm imported stays in either case, and the bake reports it.)",
            example: "keep = false",
            ..KEY
        },
        TomlKey {
            name: "priority",
            value: ValueType::Integer {
                least: 1,
                most: oven_distro::MAX_PRIORITY as u64,
                unit: "as apt counts",
            },
            default: DefaultValue::Said("the package manager's own, which is usually 500"),
            doc: "How much its packages are preferred to those of other repositories, as apt counts: most repositories \
                  have 500, backports have 100, and a package of a repository with a larger number is chosen even if \
                  others have a newer version. Only with 1000 it also replaces a newer installed version. For dnf and \
                  zypper, where smaller numbers are preferred, oven converts it: 500 becomes their default 99, 1000 \
                  becomes 1, and 100 becomes 499. yum needs its priorities plugin. To take single packages from a suite, \
                  write `\"name/suite\"` in `packages`.",
            example: "priority = 600",
            ..KEY
        },
    ],
    rules: &[KeyRule::Unless("key", "signed", Literal::Boolean(false))],
};

pub(super) const HOLD: TomlKey = TomlKey {
    name: "hold",
    value: ValueType::Array(&ArrayRule {
        element: text(concat!("^", package!(), "$")),
        first: None,
        least: 0,
        unique: true,
    }),
    expected: "an array of packages, such as [\"postgresql-15\"]",
    doc: "Packages that no upgrade changes, neither in this bake nor on an instance of the image. With dnf 4 and yum, \
          `hold` needs the versionlock plugin.",
    example: "hold = [\"postgresql-15\"]",
    ..KEY
};

pub(super) const DEBCONF: TomlKey = TomlKey {
    name: "debconf",
    value: ValueType::Array(&ArrayRule {
        element: ValueType::Text(TextRule {
            pattern: concat!(
                r"^\s*[A-Za-z0-9][A-Za-z0-9+.:-]*[ \t]\s*[^ \t]+[ \t]\s*",
                r"(boolean|error|multiselect|note|password|select|string|text)([ \t][^\x00-\x08\x0a-\x1f\x7f-\x9f]*)?$"
            ),
            never: r"\\$",
            ..ANY_TEXT
        }),
        first: None,
        least: 0,
        unique: false,
    }),
    expected: crate::definition::repositories::DEBCONF,
    doc: "Answers to the questions that Debian's packages ask when they are installed. Each is one line: package, \
          question, type and value, as `debconf-set-selections` reads it.",
    example: "debconf = [\"tzdata tzdata/Areas select Europe\"]",
    ..KEY
};

pub(super) const DISTRO: TomlKey = TomlKey {
    name: "distro",
    value: text("^[a-z0-9_-]+$"),
    expected: "a plugin's name, such as \"debian\"; `oven plugin list` lists them",
    default: DefaultValue::Said("the plugin that claims the base image"),
    doc: "The distro plugin for this image. Set it if several plugins claim the base image. A plugin that is not built \
          in is part of the fingerprint.",
    example: "distro = \"debian\"",
    ..KEY
};

pub(super) const CONFFILES: TomlKey = TomlKey {
    name: "conffiles",
    value: ValueType::Words(&["keep", "replace"]),
    expected: "\"keep\" (the image's configuration files stay) or \"replace\" (the package's files replace them)",
    default: DefaultValue::Is(Literal::Text("keep")),
    doc: "Which version of a configuration file is used if both the image and a package changed it: `\"keep\"` uses \
          the image's version, `\"replace\"` the package's version. With rpm, each package decides this itself, and \
          the bake reports what happened to the file.",
    example: "conffiles = \"replace\"",
    ..KEY
};
