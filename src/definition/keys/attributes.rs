//! `[disk]` and `[image]`.

use crate::cloud::ec2_rules::MAX_VOLUME_GIB;
use crate::config::key_table::Condition::{Absent, Is, Present, Within};
use crate::config::key_table::{
    ANY_TEXT, DefaultValue, KEY, KeyRule, Literal, NO, Section, TextRule, TomlKey, ValueType,
};

/// The boot mode that a TPM requires (EC2 user guide, NitroTPM). It is the only boot mode of arm64.
pub const UEFI: &str = "uefi";

pub(crate) const BOOT_MODES: [&str; 3] = ["legacy-bios", UEFI, "uefi-preferred"];

/// The volume's type if neither the definition nor the base names one. EC2's own default is gp2, which is slower and
/// more expensive.
pub const DEFAULT_TYPE: &str = "gp3";

const FROM_BASE: DefaultValue = DefaultValue::Said("the base image's");

pub(super) const DISK_KEY: TomlKey = TomlKey {
    name: "disk",
    value: ValueType::Table(&DISK),
    doc: "The disk: the volume for the bake, and the root volume of instances of the image. Keys that are not set \
          are inherited from the base image.",
    example: "[disk]\nsize_gib = 8\ntype = \"gp3\"",
    ..KEY
};

pub(super) const IMAGE_KEY: TomlKey = TomlKey {
    name: "image",
    value: ValueType::Table(&IMAGE),
    doc: "Attributes with which the image is registered. Keys that are not set are inherited from the base image. If \
          attributes contradict each other, the bake fails before it creates anything.",
    example: "[image]\nboot_mode = \"uefi\"\nimds = \"v2.0\"",
    ..KEY
};

/// Types that an instance can boot from.
pub(crate) const VOLUME_TYPES: &[&str] = &["gp2", "gp3", "io1", "io2", "standard"];

pub(crate) static DISK: Section = Section {
    header: "[disk]",
    keys: &[
        TomlKey {
            name: "size_gib",
            value: ValueType::Integer { least: 1, most: MAX_VOLUME_GIB, unit: "GiB" },
            default: FROM_BASE,
            doc: "The size in GiB. If the disk is larger than the base's, partition and file system grow with it. It \
                  cannot be smaller.",
            example: "size_gib = 8",
            ..KEY
        },
        TomlKey {
            name: "type",
            value: ValueType::Words(VOLUME_TYPES),
            expected: "a volume type, such as \"gp3\"",
            default: DefaultValue::Said("the base image's; the volume for the bake is then a gp3"),
            doc: "The type of EBS volume. `sc1` and `st1` are rejected, because instances cannot boot from them.",
            example: "type = \"gp3\"",
            ..KEY
        },
        TomlKey {
            name: "iops",
            value: ValueType::Integer { least: 1, most: u32::MAX as u64, unit: "IOPS" },
            default: FROM_BASE,
            doc: "The provisioned IOPS: 3000 to 80000 with gp3, 100 to 64000 with io1, 100 to 256000 with io2. With \
                  io1 and io2 it is required. With gp2 and standard it cannot be set.",
            example: "iops = 4000",
            ..KEY
        },
        TomlKey {
            name: "throughput",
            value: ValueType::Integer { least: 1, most: u32::MAX as u64, unit: "MiB/s" },
            default: FROM_BASE,
            doc: "The provisioned throughput in MiB/s, only for gp3: 125 to 2000.",
            example: "throughput = 250",
            ..KEY
        },
        TomlKey {
            name: "encrypted",
            value: ValueType::Boolean,
            default: FROM_BASE,
            doc: "Whether the disk, and so the snapshot, is encrypted.",
            example: "encrypted = true",
            ..KEY
        },
        TomlKey {
            name: "kms_key",
            value: ValueType::Text(TextRule {
                pattern: "^((alias/|arn:|mrk-)[A-Za-z0-9_/:-]*|[0-9A-Fa-f-]{36})$",
                most: 2048,
                ..ANY_TEXT
            }),
            expected: "a KMS key's id, ARN or alias, such as \"alias/images\"",
            default: DefaultValue::Said("the account's default key for EBS"),
            doc: "The KMS key that encrypts the disk: its id, ARN or alias. It requires `encrypted = true`. `oven \
                  policy --kms-key ARN` prints the permissions for it.",
            example: "encrypted = true\nkms_key = \"alias/images\"",
            ..KEY
        },
        TomlKey {
            name: "writable",
            value: ValueType::Boolean,
            default: NO,
            doc: "Whether steps can write to the device nodes of the image's disk, as `grub-install` does. By default, \
                  they can only read them. A step that writes to a mounted partition can damage its file system, and \
                  can even crash the builder's kernel. So set it only if a step installs a boot loader, and trust the \
                  code of all steps. Tests and `oven shell` can never write to the nodes.",
            example: "writable = true",
            ..KEY
        },
    ],
    // These are the limits of each type (Amazon EBS user guide, volume types). EC2 also has limits that depend on the
    // volume's size. EC2 itself checks those.
    rules: &[
        KeyRule::Needs("kms_key", "encrypted", Literal::Boolean(true)),
        KeyRule::When("type", Literal::Text("gp2"), &[Absent("iops"), Absent("throughput")]),
        KeyRule::When(
            "type",
            Literal::Text("gp3"),
            &[Within("iops", 3000, 80_000), Within("throughput", 125, 2000)],
        ),
        // EC2 creates an io1 or io2 volume only if its IOPS are set.
        KeyRule::When(
            "type",
            Literal::Text("io1"),
            &[Within("iops", 100, 64_000), Absent("throughput"), Present("iops")],
        ),
        KeyRule::When(
            "type",
            Literal::Text("io2"),
            &[Within("iops", 100, 256_000), Absent("throughput"), Present("iops")],
        ),
        KeyRule::When("type", Literal::Text("standard"), &[Absent("iops"), Absent("throughput")]),
    ],
};

static IMAGE: Section = Section {
    header: "[image]",
    keys: &[
        TomlKey {
            name: "boot_mode",
            value: ValueType::Words(&BOOT_MODES),
            default: FROM_BASE,
            doc: "How instances boot. arm64 images boot only with `\"uefi\"`.",
            example: "boot_mode = \"uefi\"",
            ..KEY
        },
        TomlKey {
            name: "ena",
            value: ValueType::Boolean,
            default: FROM_BASE,
            doc: "Whether the image supports the Elastic Network Adapter.",
            example: "ena = true",
            ..KEY
        },
        TomlKey {
            name: "sriov",
            value: ValueType::Words(&["simple", "none"]),
            default: FROM_BASE,
            doc: "Whether the image supports enhanced networking with the Intel 82599 interface, which is older than \
                  ENA (`\"simple\"`).",
            example: "sriov = \"simple\"",
            ..KEY
        },
        TomlKey {
            name: "tpm",
            value: ValueType::Words(&["v2.0", "none"]),
            default: FROM_BASE,
            doc: "Whether instances have a NitroTPM. It requires the boot mode `\"uefi\"`.",
            example: "boot_mode = \"uefi\"\ntpm = \"v2.0\"",
            ..KEY
        },
        TomlKey {
            name: "imds",
            value: ValueType::Words(&["v2.0", "optional"]),
            default: FROM_BASE,
            doc: "Which versions of the metadata service instances of the image accept: `\"v2.0\"` is only IMDSv2, \
                  `\"optional\"` is both.",
            example: "imds = \"v2.0\"",
            ..KEY
        },
    ],
    rules: &[KeyRule::When("tpm", Literal::Text("v2.0"), &[Is("boot_mode", Literal::Text(UEFI))])],
};
