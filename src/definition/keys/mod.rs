//! The keys of image.toml. The reference page and the schema are generated from this table. The parser uses the table's
//! names, types, allowed words, integer bounds, defaults and required keys. It also uses the rule
//! `OneOf`, and the rules of `[disk]` for each volume type (`attributes.rs`). It does not use the table's patterns and
//! lengths. The code in `src/definition/` that reads a key checks patterns, lengths and all other rules. `validate.rs`
//! has the checks that several keys share.
//!
//! docs/developing.md ("A definition key") lists all files that a new key touches.

mod attributes;
mod packages;
mod steps;

pub use attributes::{DEFAULT_TYPE, UEFI};
pub(crate) use attributes::{DISK, VOLUME_TYPES};

use super::validate::{MAX_NAME, MAX_USER_TAGS};
use super::vars::RESERVED;
use crate::cloud::ec2_rules::{IMAGE_NAME_LENGTH, MAX_DESCRIPTION, MAX_TAG_KEY, MAX_TAG_VALUE};
use crate::cloud::tag;
use crate::config::key_table::{
    ANY_TEXT, ArrayRule, DefaultValue, KEY, KeyRule, Literal, NO, Section, TextRule, TomlKey, UserTable,
    ValueType, text,
};

/// A pattern: one line, without control characters.
const LINE: &str = r"^[^\x00-\x1f\x7f-\x9f]*$";
/// Like [`LINE`], but not empty.
const FILLED: &str = r"^[^\x00-\x1f\x7f-\x9f]+$";
/// A text that can be an environment variable's value or an argument.
const NO_NUL: ValueType = text(r"^[^\x00]*$");
const ARGUMENTS: ValueType =
    ValueType::Array(&ArrayRule { element: NO_NUL, first: None, least: 0, unique: false });
/// A path that is relative to the definition's directory.
const RELATIVE: &str = r"^[^/\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$";
/// A path of a file that the checksum covers: it is neither a directory nor hidden.
const SOURCE: ValueType =
    ValueType::Text(TextRule { pattern: RELATIVE, never: r"/$|(^|/)\.[^/]*$", ..ANY_TEXT });
const IMAGE_PATH: &str = r"^(/[^/\x00-\x1f\x7f-\x9f]+)+$";
const ACCOUNT: ValueType = ValueType::Text(TextRule {
    pattern: "^([0-9]{1,10}|[A-Za-z_][A-Za-z0-9_.-]*)$",
    never: "^4294967295$",
    most: 32,
    ..ANY_TEXT
});
const VARIABLE: TextRule = TextRule { pattern: "^[A-Za-z_][A-Za-z0-9_]*$", ..ANY_TEXT };
/// The name of a variable that every step gets.
const FREE_VARIABLE: TextRule = TextRule { reserved: &RESERVED, ..VARIABLE };

macro_rules! spellings {
    () => {
        "\"ami-…\" (an image), \"../base\" (another definition), { name = \"debian-12-*\", owner = \"136693071363\" \
         }, { tag = { role = \"base\" } } or { ssm = \"/aws/service/…\" }; if several images match, the newest is \
         used"
    };
}
/// The allowed values of `from`, for messages.
pub(super) const SPELLINGS: &str = spellings!();

/// The whole file.
pub static IMAGE_TOML: Section = Section {
    header: "",
    keys: &[
        TomlKey {
            name: "name",
            value: ValueType::Text(TextRule {
                pattern: r"^[A-Za-z0-9()\[\]./'@_-]([A-Za-z0-9 ()\[\]./'@_-]*[A-Za-z0-9()\[\]./'@_-])?$",
                most: MAX_NAME,
                ..ANY_TEXT
            }),
            expected: "a name, such as \"web\"",
            default: DefaultValue::Said("the name of the definition's directory"),
            doc: "The name of the definition. Each AMI is named `<name>-<12 digits of the fingerprint>`.\n\nIf the \
                  name changes, oven bakes a new image. So set it if the directory's name may differ between \
                  checkouts, as in CI. The name has at most 106 characters: ASCII letters, digits, spaces and \
                  ``()[]./-'@_``.",
            example: "name = \"web\"",
            ..KEY
        },
        TomlKey {
            name: "description",
            value: ValueType::Text(TextRule { pattern: LINE, most: MAX_DESCRIPTION, ..ANY_TEXT }),
            expected: "a string",
            default: DefaultValue::Is(Literal::Text("")),
            doc: "The description of the AMI. It is one line of at most 255 characters.",
            example: "description = \"nginx with our site\"",
            ..KEY
        },
        TomlKey {
            name: "from",
            value: ValueType::Either(&[
                text(r"^(ami-([0-9a-f]{8}|[0-9a-f]{17})|\.|\.\.|.*/.*)$"),
                ValueType::Table(&FROM),
            ]),
            expected: SPELLINGS,
            required: Some(concat!("write ", spellings!())),
            doc: "The base image.\n\nA text is an AMI's id (`\"ami-…\"`), or the directory of the definition whose \
                  image is the base (`\"../base\"`). `oven bake` bakes that definition, the parent, first. If the \
                  parent's image changed, it bakes this image again.\n\nA table searches for an image by `id`, `name`, \
                  `tag` or `ssm`: exactly one of them. If several images match, the newest one is the base.",
            example: "from = { name = \"debian-12-*\", owner = \"self\" }",
            ..KEY
        },
        packages::PACKAGES,
        packages::UPGRADE,
        packages::RECOMMENDS,
        packages::REPOSITORY,
        packages::HOLD,
        packages::DEBCONF,
        packages::DISTRO,
        packages::CONFFILES,
        TomlKey {
            name: "selinux",
            value: ValueType::Words(&["label", "autorelabel"]),
            expected: "\"label\" (files are labelled by the image's own policy) or \"autorelabel\" (by each instance)",
            default: DefaultValue::Is(Literal::Text("label")),
            doc: "How new files get their SELinux labels, if SELinux is enabled in the image. With `\"label\"`, oven \
                  writes the labels that the image's own policy defines for these files. With `\"autorelabel\"` each \
                  instance labels all files when it first boots, and then reboots once.",
            example: "selinux = \"autorelabel\"",
            ..KEY
        },
        TomlKey {
            name: "network",
            value: ValueType::Boolean,
            default: NO,
            doc: "Whether the scripts of packages have the network while packages are installed. By default only \
                  downloads have it. Each `[[run]]` has its own key `network`.",
            example: "network = true",
            ..KEY
        },
        TomlKey {
            name: "imds",
            value: ValueType::Boolean,
            default: NO,
            doc: "Whether steps that have the network can reach the builder's metadata service, and so the credentials \
                  of the builder's role. By default, packets from these steps to the service are dropped. (The key \
                  `imds` of `[image]` configures instances of the image.)",
            example: "imds = true",
            ..KEY
        },
        TomlKey {
            name: "inputs",
            value: ValueType::Array(&ArrayRule {
                element: text(RELATIVE),
                first: None,
                least: 0,
                unique: true,
            }),
            expected: "an array of directories, such as [\"../common\"]",
            doc: "Additional directories whose files are part of the definition: `[[file]]` and scripts may name files \
                  in them, and if such a file changes, the next bake makes a new image. Paths are relative to the \
                  definition's directory.\n\nThese directories, and the files that symbolic links in the definition lead to, \
                  must be inside the project, and not in a `.git`. If the definition's directory has a `.git`, it is the project. \
                  Otherwise the project is the nearest directory above it with a `.git` or an `oven.toml`, \
                  or else its parent directory.",
            example: "inputs = [\"../common\"]",
            ..KEY
        },
        TomlKey {
            name: "file",
            value: ValueType::Tables(&FILE),
            doc: "A file that is copied into the image. Each file has its own `[[file]]`. A bake installs the packages, \
                  places the files, runs each `[[run]]` and `[[ansible]]`, places the files with `after = \"run\"`, and \
                  then runs each `[[test]]`.",
            example: "[[file]]\nsource = \"files/nginx.conf\"\ntarget = \"/etc/nginx/nginx.conf\"\nmode = \"0644\"",
            ..KEY
        },
        steps::RUN_KEY,
        steps::ANSIBLE_KEY,
        steps::TEST_KEY,
        TomlKey {
            name: "vars",
            value: ValueType::Map(&UserTable {
                header: "[vars]",
                names: FREE_VARIABLE,
                values: NO_NUL,
                least: 0,
                most: 0,
            }),
            doc: "Variables and their default values, which are strings. Scripts have them in their environment, and \
                  templates and playbooks can use them. `--var NAME=VALUE` overrides a value for one bake.\n\nThe \
                  values are part of the fingerprint, so another value makes another image. A name such as `PATH`, \
                  which changes how the programs of a step behave, is rejected. The `env` of a single `[[run]]` may \
                  set it.",
            example: "[vars]\nversion = \"1.4\"",
            ..KEY
        },
        attributes::DISK_KEY,
        attributes::IMAGE_KEY,
        TomlKey {
            name: "tags",
            value: ValueType::Map(&UserTable {
                header: "[tags]",
                names: TextRule {
                    pattern: FILLED,
                    never: "^[Aa][Ww][Ss]:",
                    reserved: &["oven:*", tag::CHECKSUM],
                    most: MAX_TAG_KEY,
                },
                values: ValueType::Text(TextRule { pattern: LINE, most: MAX_TAG_VALUE, ..ANY_TEXT }),
                least: 0,
                most: MAX_USER_TAGS,
            }),
            doc: "Tags of the image and of its snapshot. At most 41 are allowed, because EC2 allows 50 and oven \
                  needs 9 of them. A key has at most 128 characters and a value at most 256; keys that begin with \
                  `aws:` or `oven:` are reserved.",
            example: "[tags]\nrole = \"web\"",
            ..KEY
        },
        TomlKey {
            name: "clean",
            value: ValueType::Table(&CLEAN),
            doc: "Settings of the clean-up at the end of a bake.",
            example: "[clean]\nkeep = [\"/var/log/app\"]",
            ..KEY
        },
    ],
    rules: &[],
};

static FROM: Section = Section {
    header: "`from`",
    keys: &[
        TomlKey {
            name: "id",
            value: text("^ami-([0-9a-f]{8}|[0-9a-f]{17})$"),
            expected: "an image's id, such as \"ami-0123456789abcdef0\"",
            doc: "The id of the base image. It is the same as `from = \"ami-…\"`, but can be combined with \
                  `deprecated`.",
            example: "from = { id = \"ami-0123456789abcdef0\", deprecated = true }",
            ..KEY
        },
        TomlKey {
            name: "name",
            value: ValueType::Text(TextRule {
                pattern: r"^[A-Za-z0-9 ()\[\]./'@_*?-]+$",
                never: "^ *$",
                most: IMAGE_NAME_LENGTH.1,
                ..ANY_TEXT
            }),
            expected: "an image's name, which may have `*` and `?`",
            doc: "The name of the base image. `*` stands for any number of characters, and `?` for exactly one.",
            example: "from = { name = \"debian-12-amd64-*\", owner = \"136693071363\" }",
            ..KEY
        },
        TomlKey {
            name: "tag",
            value: ValueType::Map(&UserTable {
                header: "`tag` of `from`",
                names: TextRule { pattern: FILLED, most: MAX_TAG_KEY, ..ANY_TEXT },
                values: ValueType::Text(TextRule {
                    pattern: r"^[^*?\\\x00-\x1f\x7f-\x9f]*$",
                    most: MAX_TAG_VALUE,
                    ..ANY_TEXT
                }),
                least: 1,
                most: 1,
            }),
            expected: "a table of one tag, such as { role = \"base\" }",
            doc: "One tag of the base image. Write its whole value, without `*` or `?`.",
            example: "from = { tag = { role = \"base\" }, owner = \"self\" }",
            ..KEY
        },
        TomlKey {
            name: "ssm",
            value: ValueType::Text(TextRule { pattern: "^[A-Za-z0-9/_.:-]+$", most: 2048, ..ANY_TEXT }),
            expected: "a parameter's name, such as \"/aws/service/…\"",
            doc: "The name of a parameter in the Systems Manager's parameter store that holds the id of the base \
                  image. Distributions publish their newest images this way.",
            example: "from = { ssm = \"/aws/service/debian/release/12/latest/amd64\" }",
            ..KEY
        },
        TomlKey {
            name: "owner",
            value: text("^([0-9]{12}|self|amazon|aws-marketplace|aws-backup-vault)$"),
            expected: "an account's 12 digits in quotes, or \"self\"",
            default: DefaultValue::Said("your own account"),
            doc: "Who owns the base image: the 12 digits of an account, `\"self\"`, `\"amazon\"`, \
                  `\"aws-marketplace\"` or `\"aws-backup-vault\"`. It works only with `name` and `tag`. In AWS it is \
                  required with `name`, because anybody can publish an image under any name.",
            example: "from = { name = \"al2023-ami-2023.*-x86_64\", owner = \"amazon\" }",
            ..KEY
        },
        TomlKey {
            name: "deprecated",
            value: ValueType::Boolean,
            default: NO,
            doc: "Whether the base may be an image that its owner deprecated.",
            example: "from = { id = \"ami-0123456789abcdef0\", deprecated = true }",
            ..KEY
        },
    ],
    rules: &[KeyRule::OneOf(&["id", "name", "ssm", "tag"]), KeyRule::Excludes("owner", &["id", "ssm"])],
};

static FILE: Section = Section {
    header: "[[file]]",
    keys: &[
        TomlKey {
            name: "source",
            value: SOURCE,
            expected: "a path, such as \"files/motd\"",
            required: Some("a file in the definition's directory, such as \"files/motd\""),
            doc: "The file to copy. The path is relative to the definition's directory. The file must be in that \
                  directory or in one of `inputs`. A file whose name begins with a dot is rejected, because it is \
                  not part of the checksum.",
            example: "source = \"files/nginx.conf\"",
            ..KEY
        },
        TomlKey {
            name: "target",
            value: ValueType::Text(TextRule {
                pattern: IMAGE_PATH,
                never: r"/\.{1,2}(/|$)|^/(dev|proc|run|sys)(/|$)",
                ..ANY_TEXT
            }),
            expected: "a path in the image, such as \"/etc/motd\"",
            required: Some("a path in the image, such as \"/etc/motd\""),
            doc: "The file's path in the image, which is absolute. Missing directories are created. The path cannot \
                  be below `/dev`, `/proc`, `/run` or `/sys`, because other file systems are mounted there when an \
                  instance boots.",
            example: "target = \"/etc/nginx/nginx.conf\"",
            ..KEY
        },
        TomlKey {
            name: "mode",
            value: text("^[0-7]{3,4}$"),
            expected: "octal digits in quotes, such as \"0644\"",
            default: DefaultValue::Said("`\"0755\"` if the source is executable, else `\"0644\"`"),
            doc: "The permissions of the file: three or four octal digits in quotes.",
            example: "mode = \"0640\"",
            ..KEY
        },
        TomlKey {
            name: "owner",
            value: ACCOUNT,
            expected: "a name or a number in quotes, such as \"www-data\" or \"33\"",
            default: DefaultValue::Is(Literal::Text("root")),
            doc: "The user that owns the file: a name that the image knows when the file is placed, or a number, in \
                  quotes.",
            example: "owner = \"www-data\"",
            ..KEY
        },
        TomlKey {
            name: "group",
            value: ACCOUNT,
            expected: "a name or a number in quotes, such as \"www-data\" or \"33\"",
            default: DefaultValue::Is(Literal::Text("root")),
            doc: "The group of the file: a name that the image knows when the file is placed, or a number, in quotes.",
            example: "group = \"33\"",
            ..KEY
        },
        TomlKey {
            name: "template",
            value: ValueType::Boolean,
            default: NO,
            doc: "Whether the file is a template: `{{ name }}` in it is replaced by the value of a variable of \
                  `[vars]`, as in Jinja. An unknown name is an error that names the line.",
            example: "template = true",
            ..KEY
        },
        TomlKey {
            name: "after",
            value: ValueType::Words(&["packages", "run"]),
            default: DefaultValue::Is(Literal::Text("packages")),
            doc: "When the file is placed: after the packages, so that scripts see the file, or after all `[[run]]` and \
                  `[[ansible]]`. Set `\"run\"` if a script creates the `owner`, the `group` or a file that this one \
                  replaces. Tests see the file in either case.",
            example: "owner = \"app\"\nafter = \"run\"",
            ..KEY
        },
    ],
    rules: &[],
};

static CLEAN: Section = Section {
    header: "[clean]",
    keys: &[
        TomlKey {
            name: "keep",
            value: ValueType::Array(&IMAGE_PATHS),
            expected: "an array of paths in the image, such as [\"/var/log/app\"]",
            doc: "Paths in the image that the clean-up does not change, and that the lint accepts. Files that scripts \
                  of packages made are not reported.",
            example: "keep = [\"/var/log/app\"]",
            ..KEY
        },
        TomlKey {
            name: "remove",
            value: ValueType::Array(&IMAGE_PATHS),
            expected: "an array of paths in the image, such as [\"/etc/app/secret.key\"]",
            doc: "Paths in the image that the clean-up removes, with everything below them. `*` matches any characters \
                  within one name. Use it for keys, ids and passwords that a package's script made, if the program \
                  makes new ones when it starts. Rejected are the directories without which an image does not boot, \
                  such as `/usr` and `/etc/*`, patterns with `*` in the first name, and files that a `[[file]]` \
                  places.",
            example: "remove = [\"/etc/app/secret.key\"]",
            ..KEY
        },
    ],
    rules: &[],
};

static IMAGE_PATHS: ArrayRule = ArrayRule {
    element: ValueType::Text(TextRule {
        pattern: r"^(/[^/\x00-\x1f\x7f-\x9f]+)+/?$",
        never: r"/\.{1,2}(/|$)",
        ..ANY_TEXT
    }),
    first: None,
    least: 0,
    unique: false,
};
