//! The keys of oven.toml. The parser works from this table, and the reference page and the schema are generated from
//! it.

use super::{CACHE_GIB, CACHE_MOST, MEMORY_MOST, PIDS, PIDS_LEAST, PIDS_MOST};
use crate::config::key_table::{
    ANY_TEXT, DefaultValue, KEY, Literal, Section, TextRule, TomlKey, ValueType, text,
};

const PATH: ValueType = text(r"^[^\x00]+$");

/// A pattern for the host and the path of a URL.
macro_rules! host {
    () => {
        r"[!#%&()*+,.0-9=?A-Z\[\]_a-z~-][!#%&()*+,.0-9:=?A-Z\[\]_a-z~-]*(/[!#%&()*+,./0-9:=?@A-Z\[\]_a-z~-]*)?$"
    };
}
/// A pattern for the user's name and password in a URL.
macro_rules! user {
    () => {
        r"([!#%&()*+,.0-9:=?@A-Z\[\]_a-z~-]*@)?"
    };
}

/// The whole file.
pub static OVEN_TOML: Section = Section {
    header: "",
    keys: &[
        TomlKey {
            name: "cloud",
            value: ValueType::Words(&["local", "aws"]),
            default: DefaultValue::Is(Literal::Text("local")),
            doc: "Where images are baked. `\"aws\"` is EC2: oven runs on an instance, or with `disks = \"direct\"` on \
                  any Linux machine. `\"local\"` is a local region: a directory, with loop devices as volumes. The \
                  flag is `--cloud`, and the environment variable is `OVEN_CLOUD`.",
            example: "cloud = \"aws\"",
            ..KEY
        },
        TomlKey {
            name: "region_dir",
            value: PATH,
            expected: "a directory, such as \"../region\"",
            default: DefaultValue::Said("`/var/lib/oven/region`"),
            doc: "The directory of the local region. It is relative to the directory of oven.toml, and cannot be \
                  inside a definition. The flag is `--region-dir`, and the environment variable is `OVEN_REGION_DIR`.",
            example: "region_dir = \"/srv/oven\"",
            ..KEY
        },
        TomlKey {
            name: "region",
            value: ValueType::Text(TextRule { pattern: "^[A-Za-z0-9][A-Za-z0-9-]*$", most: 64, ..ANY_TEXT }),
            expected: "a region's name, such as \"eu-central-1\"",
            default: DefaultValue::Said("the builder's own region"),
            doc: "The AWS region. The flag is `--region`, and the environment variable is `OVEN_REGION`.",
            example: "region = \"eu-central-1\"",
            ..KEY
        },
        TomlKey {
            name: "instance_id",
            value: text("^i-([0-9a-f]{8}|[0-9a-f]{17})$"),
            expected: "an instance's id, such as \"i-0123456789abcdef0\"",
            default: DefaultValue::Said("the value from the metadata service"),
            doc: "The id of the builder's instance. It is needed if the metadata service is not reachable. The flag \
                  is `--instance-id`, and the environment variable is `OVEN_INSTANCE_ID`.",
            example: "instance_id = \"i-0123456789abcdef0\"",
            ..KEY
        },
        TomlKey {
            name: "zone",
            value: ValueType::Text(TextRule {
                pattern: "^[a-z0-9-]*-[a-z0-9-]*[a-z]$",
                most: 64,
                ..ANY_TEXT
            }),
            expected: "an availability zone, such as \"eu-central-1a\"",
            default: DefaultValue::Said("the value from the metadata service"),
            doc: "The availability zone of the builder's instance. It is needed if the metadata service is not \
                  reachable. The flag is `--zone`, and the environment variable is `OVEN_ZONE`.",
            example: "zone = \"eu-central-1a\"",
            ..KEY
        },
        TomlKey {
            name: "disks",
            value: ValueType::Words(&["attached", "direct"]),
            default: DefaultValue::Is(Literal::Text("attached")),
            doc: "How a bake gets its disk. `\"attached\"` creates a volume from the base's snapshot and attaches it. \
                  `\"direct\"` attaches no volume: oven reads a block of the base when the block is first used, stores \
                  all writes on this machine, and uploads the blocks that differ from the base's to a new \
                  snapshot whose parent is the base's snapshot. `\"direct\"` needs FUSE and loop devices. The image and its fingerprint do not depend on \
                  this setting. The flag is `--disks`, and the environment variable is `OVEN_DISKS`.",
            example: "disks = \"direct\"",
            ..KEY
        },
        TomlKey {
            name: "cache_gib",
            value: ValueType::Integer { least: 1, most: CACHE_MOST, unit: "GiB" },
            default: DefaultValue::Is(Literal::Integer(CACHE_GIB)),
            doc: "The maximal size in GiB of the cache for blocks of base images, which `disks = \"direct\"` uses. If \
                  the cache becomes larger, or if less than 1 GiB is free on its disk, the least recently used blocks \
                  are removed. The cache is `blocks/` in the region's directory (in AWS: in `/var/lib/oven`).",
            example: "cache_gib = 40",
            ..KEY
        },
        TomlKey {
            name: "network",
            value: ValueType::Table(&NETWORK),
            doc: "Settings for downloads. None of them stays in the image, and scripts do not get them.",
            example: "[network]\nproxy = \"http://proxy.example:3128\"",
            ..KEY
        },
        TomlKey {
            name: "limits",
            value: ValueType::Table(&LIMITS),
            doc: "The limits of each step. A step is one command that runs in the image, such as an installation, a \
                  script or a test. A step that exceeds a limit fails, and the bake ends with exit code 5. The limits \
                  need cgroup v2 with the controllers `memory` and `pids`. If oven cannot use them, the log of a bake \
                  says so, a bake warns if oven.toml sets a limit, and `oven doctor` shows the reason.",
            example: "[limits]\nmemory_gib = 4",
            ..KEY
        },
    ],
    rules: &[],
};

static LIMITS: Section = Section {
    header: "[limits]",
    keys: &[
        TomlKey {
            name: "memory_gib",
            value: ValueType::Integer { least: 1, most: MEMORY_MOST, unit: "GiB" },
            default: DefaultValue::Said("half of the machine's memory, but at least 1"),
            doc: "The memory in GiB that all processes of a step can use together. The files in the step's `/dev/shm` \
                  and `/run` count, too. A step cannot use swap space. If oven itself runs in a cgroup with a smaller \
                  limit, that limit applies.",
            example: "memory_gib = 4",
            ..KEY
        },
        TomlKey {
            name: "pids",
            value: ValueType::Integer { least: PIDS_LEAST, most: PIDS_MOST, unit: "processes" },
            default: DefaultValue::Is(Literal::Integer(PIDS)),
            doc: "The number of processes and threads that a step can have at the same time.",
            example: "pids = 8192",
            ..KEY
        },
    ],
    rules: &[],
};

static NETWORK: Section = Section {
    header: "[network]",
    keys: &[
        TomlKey {
            name: "proxy",
            value: text(concat!("^(https?|socks5h)://", user!(), host!())),
            expected: "a URL, such as \"http://proxy.example:3128\"",
            doc: "The URL of a proxy, with `http`, `https` or `socks5h`. A password in it is not shown in messages.",
            example: "proxy = \"http://proxy.example:3128\"",
            ..KEY
        },
        TomlKey {
            name: "no_proxy",
            value: text(r"^\s*([A-Za-z0-9.:*/\[\]_-]*\s*(,\s*|$))*$"),
            expected: "hosts, such as \"localhost,.example\"",
            doc: "Hosts that are reached without the proxy, separated by commas. `.example` stands for all hosts \
                  below `example`.",
            example: "no_proxy = \"localhost,.example\"",
            ..KEY
        },
        TomlKey {
            name: "mirror",
            value: text(concat!("^https?://", user!(), host!())),
            expected: "a URL, such as \"https://deb.example/debian\"",
            doc: "The URL of a mirror that replaces the image's own archive while packages are downloaded. zypper does \
                  not support it.",
            example: "mirror = \"http://mirror.example/debian\"",
            ..KEY
        },
        TomlKey {
            name: "ca_file",
            value: PATH,
            expected: "a file with certificates, such as \"ca.pem\"",
            doc: "A file on this machine with certificates in PEM that are trusted in addition to the image's own. \
                  It is relative to the directory of oven.toml. zypper does not support it.",
            example: "ca_file = \"/etc/ssl/certs/corporate.pem\"",
            ..KEY
        },
    ],
    rules: &[],
};
