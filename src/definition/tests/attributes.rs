//! `[disk]`, `[image]` and `imds`.

use super::*;

#[test]
fn each_mistake_names_line_and_key() {
    let top = tree();
    let cases: &[(&str, &str)] = &[
        (
            "[disk]\ntype = \"gp4\"",
            "3: `type` of [disk] is \"gp4\", which is not a volume type: did you mean `gp",
        ),
        (
            "[disk]\ntype = \"st1\"",
            "3: `type` of [disk] is \"st1\": instances cannot boot from this volume type",
        ),
        ("[disk]\ntype = 3", "3: `type` of [disk] is an integer: it should be a volume type"),
        ("[disk]\nwritable = 1", "3: `writable` of [disk] is an integer: it should be `true` or `false`"),
        ("[disk]\niops = 0", "3: `iops` of [disk] is 0: it should be 1 to"),
        (
            "[disk]\ntype = \"gp3\"\niops = 100",
            "4: `iops` of [disk] is 100: it must be 3000 to 80000 IOPS for type gp3",
        ),
        (
            "[disk]\niops = 64001\ntype = \"io1\"",
            "3: `iops` of [disk] is 64001: it must be 100 to 64000 IOPS for type io1",
        ),
        ("[disk]\ntype = \"io2\"", "2: `iops` of [disk] is missing: type io2 requires it"),
        (
            "[disk]\ntype = \"gp2\"\niops = 3000",
            "4: `iops` of [disk] cannot be set for type gp2, only for `gp3`, `io1` and `io2`",
        ),
        (
            "[disk]\ntype = \"io2\"\niops = 3000\nthroughput = 125",
            "5: `throughput` of [disk] cannot be set for type io2, only for `gp3`",
        ),
        (
            "[disk]\ntype = \"gp3\"\nthroughput = 2001",
            "4: `throughput` of [disk] is 2001: it must be 125 to 2000 MiB/s for type gp3",
        ),
        ("[disk]\nencrypted = \"yes\"\nkms_key = \"a\"", "3: `encrypted` of [disk] is a string"),
        ("[disk]\nkms_key = \"alias/a\"", "3: `kms_key` of [disk] requires `encrypted = true`"),
        (
            "[disk]\nencrypted = false\nkms_key = \"alias/a\"",
            "4: `kms_key` of [disk] requires `encrypted = true`",
        ),
        (
            "[disk]\nencrypted = true\nkms_key = \"images\"",
            "4: `kms_key` of [disk] is \"images\": it should be",
        ),
        ("[disk]\nencrypted = true\nkms_key = \"alias/a b\"", "4: `kms_key` of [disk] is \"alias/a b\""),
        ("[image]\nboot = \"uefi\"", "3: unknown key `boot` of [image]: did you mean `boot_mode`?"),
        (
            "[image]\nboot_mode = \"bios\"",
            "3: `boot_mode` of [image] is \"bios\": it should be \"legacy-bios\" or \"uefi\" or \"uefi-preferred\"",
        ),
        ("[image]\nena = \"yes\"", "3: `ena` of [image] is a string: it should be `true` or `false`"),
        ("[image]\nsriov = true", "3: `sriov` of [image] is a boolean: it should be \"simple\" or \"none\""),
        (
            "[image]\nimds = \"v1.0\"",
            "3: `imds` of [image] is \"v1.0\": it should be \"v2.0\" or \"optional\"",
        ),
        ("[image]\ntpm = \"2.0\"", "3: `tpm` of [image] is \"2.0\": it should be \"v2.0\" or \"none\""),
        (
            "[image]\ntpm = \"v2.0\"\nboot_mode = \"uefi-preferred\"",
            "3: `tpm` of [image] is \"v2.0\", which requires `boot_mode = \"uefi\"`, but `boot_mode` is \
             \"uefi-preferred\" (line 4)",
        ),
        ("[image]\nimds = true", "3: `imds` of [image] is a boolean: it should be \"v2.0\""),
        ("imds = \"v2.0\"", "2: `imds` is a string: it should be `true` or `false`"),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n")).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{toml}\ngives {error}");
        assert!(error.starts_with(&format!("DIR/web/image.toml:{expected}")), "{toml}\ngives {error}");
    }
}

#[test]
fn only_a_definition_that_says_so_has_a_writable_disk() {
    let top = tree();
    for (toml, expected) in [
        ("", false),
        ("[disk]\nsize_gib = 8", false),
        ("[disk]\nwritable = false", false),
        ("[disk]\nwritable = true", true),
    ] {
        let image = load(top.path(), &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n")).unwrap();
        assert_eq!(image.disk_writable, expected, "{toml}");
    }
}
