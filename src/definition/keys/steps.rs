//! The keys of `[[run]]`, `[[ansible]]` and `[[test]]`.

use super::{ARGUMENTS, FREE_VARIABLE, NO_NUL, SOURCE, VARIABLE};
use crate::config::key_table::{
    ArrayRule, DefaultValue, KEY, KeyRule, Literal, NO, Section, TextRule, TomlKey, UserTable, ValueType,
    text,
};
use crate::definition::scripts::{DEFAULT_TIMEOUT, MAX_RETRIES, MAX_TIMEOUT};

pub(super) const RUN_KEY: TomlKey = TomlKey {
    name: "run",
    value: ValueType::Tables(&RUN),
    doc: "A script, or a program of the image, that changes the image. `[[run]]` and `[[ansible]]` run in the order of \
          the file, after packages and files.\n\nThey run inside the image, without the network by default. Their \
          working directory is the definition's, read-only at `/run/oven/definition`. The environment has `OVEN_NAME`, \
          `OVEN_PHASE` (`run`, `ansible` or `test`), `OVEN_DEFINITION` and `OVEN_INPUTS`, and the variables of \
          `[vars]`. Services cannot be started in an image; enable them.",
    example: "[[run]]\nscript = \"setup.sh\"\n\n[[run]]\ncommand = [\"systemctl\", \"enable\", \"nginx\"]",
    ..KEY
};

pub(super) const ANSIBLE_KEY: TomlKey = TomlKey {
    name: "ansible",
    value: ValueType::Tables(&ANSIBLE),
    doc: "An Ansible playbook that runs inside the image with `connection: local`. `[[ansible]]` and `[[run]]` run in \
          the order of the file. Ansible finds roles and `collections/` in the playbook's directory.\n\nIf the image \
          has no Ansible, the distro's plugin installs `ansible-core` for the bake (with apt, dnf and dnf 5). After \
          the last playbook, oven removes the packages that were installed for Ansible, except packages that a later \
          installed package needs. With other package managers, add Ansible to `packages`. Services cannot be started \
          in an image: write `enabled: true` without `state: started`.",
    example: "[[ansible]]\nplaybook = \"site.yml\"\nvars = { workers = 4 }",
    ..KEY
};

pub(super) const TEST_KEY: TomlKey = TomlKey {
    name: "test",
    value: ValueType::Tables(&TEST),
    doc: "A test of the finished image. It runs like a `[[run]]`, but after all `[[run]]` and `[[ansible]]`. If it \
          fails, no image is made. Its changes to the image are discarded. It has as much space for them as the image \
          has free space. A file of the image that it changes counts whole, because it changes a copy of the file.",
    example: "[[test]]\nscript = \"tests/web.sh\"",
    ..KEY
};

static RUN: Section = Section {
    header: "[[run]]",
    keys: &[SCRIPT, COMMAND, ARGS, env(&RUN_ENV), SECRETS, NETWORK, RETRIES, TIMEOUT],
    rules: &[KeyRule::OneOf(&["script", "command"]), KeyRule::Excludes("args", &["command"])],
};

static ANSIBLE: Section = Section {
    header: "[[ansible]]",
    keys: &[
        TomlKey {
            name: "playbook",
            value: SOURCE,
            expected: "a path, such as \"site.yml\"",
            required: Some("a file in the definition's directory, such as \"site.yml\""),
            doc: "The playbook. The path is relative to the definition's directory. The file must be in that \
                  directory or in one of `inputs`.",
            example: "playbook = \"site.yml\"",
            ..KEY
        },
        TomlKey {
            name: "vars",
            value: ValueType::Map(&UserTable {
                header: "[ansible.vars]",
                names: VARIABLE,
                values: ValueType::Anything,
                least: 0,
                most: 0,
            }),
            doc: "Variables of this playbook, of any type.",
            example: "vars = { workers = 4 }",
            ..KEY
        },
        TomlKey {
            name: "tags",
            value: ARGUMENTS,
            expected: "an array of a playbook's tags, such as [\"web\"]",
            doc: "Tags of the playbook: only tasks with one of these tags run.",
            example: "tags = [\"web\"]",
            ..KEY
        },
        TomlKey {
            doc: "Additional arguments of `ansible-playbook`.",
            example: "args = [\"--skip-tags\", \"slow\"]",
            ..ARGS
        },
        env(&ANSIBLE_ENV),
        SECRETS,
        NETWORK,
        RETRIES,
        TIMEOUT,
    ],
    rules: &[],
};

static TEST: Section = Section {
    header: "[[test]]",
    keys: &[
        SCRIPT,
        COMMAND,
        TomlKey {
            name: "bats",
            value: SOURCE,
            expected: "a path, such as \"tests/web.bats\"",
            doc: "A file with bats tests, instead of `script`. bats must be installed in the image: oven does not \
                  provide it.",
            example: "bats = \"tests/web.bats\"",
            ..KEY
        },
        ARGS,
        env(&TEST_ENV),
        SECRETS,
        NETWORK,
        RETRIES,
        TIMEOUT,
    ],
    rules: &[KeyRule::OneOf(&["script", "command", "bats"]), KeyRule::Excludes("args", &["command"])],
};

const SCRIPT: TomlKey = TomlKey {
    name: "script",
    value: SOURCE,
    expected: "a path, such as \"setup.sh\"",
    doc: "The script to run. The path is relative to the definition's directory. The file must be in that directory \
          or in one of `inputs`. It must begin with a `#!` line, such as `#!/bin/sh`, or be an ELF program.",
    example: "script = \"setup.sh\"",
    ..KEY
};

const PROGRAM: ValueType = text(r"^[^\x00]+$");

const COMMAND: TomlKey = TomlKey {
    name: "command",
    value: ValueType::Array(&ArrayRule { element: NO_NUL, first: Some(&PROGRAM), least: 1, unique: false }),
    expected: "an array of a program and its arguments, such as [\"systemctl\", \"enable\", \"x\"]",
    doc: "A program of the image and its arguments, instead of `script`. No shell is involved.",
    example: "command = [\"systemctl\", \"enable\", \"nginx\"]",
    ..KEY
};

const ARGS: TomlKey = TomlKey {
    name: "args",
    value: ARGUMENTS,
    expected: "an array of strings, such as [\"--port\", \"80\"]",
    doc: "Arguments of the script. For a `command`, put the arguments into `command`.",
    example: "args = [\"--channel\", \"stable\"]",
    ..KEY
};

const fn env(table: &'static UserTable) -> TomlKey {
    TomlKey {
        name: "env",
        value: ValueType::Map(table),
        doc: "Additional environment variables. All values are strings. Names that begin with `OVEN_` are reserved.",
        example: "env = { LANG = \"C.UTF-8\" }",
        ..KEY
    }
}

const ENV: UserTable = UserTable {
    header: "",
    names: TextRule { reserved: &["OVEN_*"], ..VARIABLE },
    values: NO_NUL,
    least: 0,
    most: 0,
};
static RUN_ENV: UserTable = UserTable { header: "[run.env]", ..ENV };
static ANSIBLE_ENV: UserTable = UserTable { header: "[ansible.env]", ..ENV };
static TEST_ENV: UserTable = UserTable { header: "[test.env]", ..ENV };

const SECRETS: TomlKey = TomlKey {
    name: "secrets",
    value: ValueType::Array(&ArrayRule {
        element: ValueType::Text(FREE_VARIABLE),
        first: None,
        least: 0,
        unique: true,
    }),
    expected: "an array of names of environment variables, such as [\"TOKEN\"]",
    doc: "Names of environment variables that oven passes on from its own environment, such as a token. If one is \
          missing, the bake fails before it begins.\n\nOnly this script gets the values. In output, logs and JSON, \
          `***` replaces them, and the bake fails if it finds a value in the finished image. The names are part of \
          the fingerprint. The values are not, so a new value does not make a new image.\n\nWith \
          `--secret`, and in CI, the bake fails before it begins if the flag does not name all of them.",
    example: "secrets = [\"REPOSITORY_TOKEN\"]",
    ..KEY
};

const NETWORK: TomlKey = TomlKey {
    name: "network",
    value: ValueType::Boolean,
    default: NO,
    doc: "Whether this step has the network. This is the builder's network, including the builder's local services.",
    example: "network = true",
    ..KEY
};

const RETRIES: TomlKey = TomlKey {
    name: "retries",
    value: ValueType::Integer { least: 0, most: MAX_RETRIES, unit: "retries" },
    default: DefaultValue::Is(Literal::Integer(0)),
    doc: "How many times the step is retried after a failure.",
    example: "retries = 2",
    ..KEY
};

const TIMEOUT: TomlKey = TomlKey {
    name: "timeout",
    value: ValueType::Integer { least: 1, most: MAX_TIMEOUT, unit: "seconds" },
    default: DefaultValue::Is(Literal::Integer(DEFAULT_TIMEOUT)),
    doc: "The time limit in seconds. A step that takes longer is stopped and counts as failed.",
    example: "timeout = 600",
    ..KEY
};
