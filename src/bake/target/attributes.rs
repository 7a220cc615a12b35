//! The attributes with which an image is registered: the base's attributes, unless `[disk]` or `[image]` overrides
//! them.

use crate::cloud::{Attributes, Base, VolumeKind};
use crate::definition::{DEFAULT_TYPE, Definition, UEFI, misfits};
use crate::error::{Kind, Mistake};
use crate::ids::Architecture;
use anyhow::Result;

/// Merges the attributes of the definition and of the base. Refuses combinations with which EC2 would refuse the
/// registration, or with which instances would not boot.
///
/// # Errors
/// [`Kind::Definition`], with the file, line and key of every mistake.
pub fn attributes(image: &Definition, base: &Base) -> Result<Attributes> {
    let (explicit, inherited) = (&image.registered, &base.attributes);
    let merge = |explicit: &Option<Option<String>>, own: &Option<String>| {
        explicit.clone().unwrap_or_else(|| own.clone())
    };
    let merged = Attributes {
        boot_mode: explicit.boot_mode.clone().or_else(|| inherited.boot_mode.clone()),
        ena: explicit.ena.or(inherited.ena),
        sriov: merge(&explicit.sriov, &inherited.sriov),
        tpm: merge(&explicit.tpm, &inherited.tpm),
        imds: merge(&explicit.imds, &inherited.imds),
        root_volume: volume(&image.volume, &inherited.root_volume),
        mappings: inherited.mappings.clone(),
        billing: inherited.billing.clone(),
    };
    let mut mistakes = Vec::new();
    let mut wrong = |key: &str, what: String| {
        let place = image.place(key, None);
        mistakes.push(Mistake { message: format!("{place} {what}"), place: Some(place), hint: None });
    };

    let arm64 = base.architecture == Architecture::Arm64;
    let firmware = merged.boot_mode.as_deref().unwrap_or(if arm64 { UEFI } else { "legacy-bios" });
    if let Some(mode) = explicit.boot_mode.as_deref().filter(|mode| arm64 && *mode != UEFI) {
        wrong(
            "image.boot_mode",
            format!("is {mode:?}, but {} is an arm64 image, which can boot only with \"uefi\"", base.id),
        );
    }
    match (&merged.tpm, &explicit.tpm) {
        (Some(_), Some(Some(_))) if firmware != UEFI && explicit.boot_mode.is_none() => {
            let what = format!(
                "requires the boot mode \"uefi\", but {} has {firmware:?}. If its disk can boot with UEFI, add \
                 `boot_mode = \"uefi\"`",
                base.id
            );
            wrong("image.tpm", what);
        }
        (Some(_), None) if firmware != UEFI && explicit.boot_mode.is_some() => {
            let what = format!(
                "is {firmware:?}, but {} has a TPM, which requires \"uefi\": add `tpm = \"none\"`",
                base.id
            );
            wrong("image.boot_mode", what);
        }
        _ => {}
    }
    // Checks only the values that the definition sets, because EC2 has already accepted the base's values.
    let VolumeKind { iops, throughput, .. } = image.volume;
    let checked = VolumeKind { iops, throughput, ..merged.root_volume.clone() };
    for (key, what) in misfits(&checked) {
        if (key == "iops" && iops.is_some()) || key == "throughput" {
            wrong(&format!("disk.{key}"), what);
        }
    }
    if image.volume.encrypted == Some(false) && inherited.root_volume.encrypted == Some(true) {
        let what = format!(
            "is false, but {} is encrypted, so every volume that is created from it is also encrypted",
            base.id
        );
        wrong("disk.encrypted", what);
    }
    if mistakes.is_empty() {
        return Ok(merged);
    }
    let messages: Vec<_> = mistakes.iter().map(|mistake| mistake.message.as_str()).collect();
    Err(Kind::Definition.failure(messages.join("\n")).with_mistakes(mistakes).into())
}

/// The definition's values override the base's. If the definition sets another volume type, the base's IOPS and
/// throughput are dropped, because they were chosen for the base's type.
fn volume(explicit: &VolumeKind, inherited: &VolumeKind) -> VolumeKind {
    let provisioned = explicit.iops.is_some() || explicit.throughput.is_some();
    let named = explicit.volume_type.clone().or_else(|| inherited.volume_type.clone());
    let same = explicit.volume_type.is_none() || explicit.volume_type == inherited.volume_type;
    let inherited_of = |value: Option<u32>| value.filter(|_| same);
    VolumeKind {
        volume_type: named.or_else(|| provisioned.then(|| DEFAULT_TYPE.to_owned())),
        iops: explicit.iops.or_else(|| inherited_of(inherited.iops)),
        throughput: explicit.throughput.or_else(|| inherited_of(inherited.throughput)),
        encrypted: explicit.encrypted.or(inherited.encrypted),
        kms_key: explicit.kms_key.clone().or_else(|| inherited.kms_key.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Mapping;
    use crate::ids::{ImageId, SnapshotId};

    fn base(architecture: Architecture, attributes: Attributes) -> Base {
        Base {
            id: ImageId("ami-0123456789abcdef0".into()),
            name: "debian".into(),
            snapshot: SnapshotId("snap-0123456789abcdef0".into()),
            architecture,
            size_gib: 8,
            root_device: "/dev/xvda".into(),
            attributes,
        }
    }

    fn text(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    /// A base image that has every attribute.
    fn whole() -> Attributes {
        Attributes {
            boot_mode: text("uefi"),
            ena: Some(true),
            sriov: text("simple"),
            tpm: text("v2.0"),
            imds: text("v2.0"),
            root_volume: VolumeKind {
                volume_type: text("gp3"),
                iops: Some(4000),
                throughput: Some(250),
                encrypted: Some(true),
                kms_key: text("alias/base"),
            },
            mappings: vec![Mapping { device: "/dev/sdb".into(), ..Mapping::default() }],
            billing: Some(("Linux/UNIX".into(), "RunInstances".into())),
        }
    }

    fn merge(toml: &str, base: &Base) -> Result<Attributes, String> {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("web");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("image.toml"), format!("from = \"ami-0123456789abcdef0\"\n{toml}\n"))
            .unwrap();
        let image = Definition::load(&dir).unwrap();
        attributes(&image, base).map_err(|error| {
            assert_eq!(Kind::of(&error), Kind::Definition);
            format!("{error:#}").replace(top.path().to_str().unwrap(), "DIR")
        })
    }

    #[test]
    fn missing_keys_are_inherited_from_the_base() {
        for attributes in [Attributes::default(), whole()] {
            for architecture in [Architecture::X86_64, Architecture::Arm64] {
                assert_eq!(merge("", &base(architecture, attributes.clone())), Ok(attributes.clone()));
            }
        }
    }

    #[test]
    fn explicit_keys_win() {
        let base = base(Architecture::X86_64, whole());
        let said = "[image]\nboot_mode = \"uefi-preferred\"\nena = false\nsriov = \"none\"\ntpm = \"none\"\nimds = \"optional\"\n\
                    [disk]\nkms_key = \"alias/ours\"\nencrypted = true\niops = 5000\n";
        let expected = Attributes {
            boot_mode: text("uefi-preferred"),
            ena: Some(false),
            sriov: None,
            tpm: None,
            imds: None,
            root_volume: VolumeKind { iops: Some(5000), kms_key: text("alias/ours"), ..whole().root_volume },
            ..whole()
        };
        assert_eq!(merge(said, &base), Ok(expected));
        let other = merge("[disk]\ntype = \"io2\"\niops = 100", &base).unwrap().root_volume;
        let expected =
            VolumeKind { volume_type: text("io2"), iops: Some(100), throughput: None, ..whole().root_volume };
        assert_eq!(other, expected);
    }

    #[test]
    fn what_a_plain_base_gets() {
        let plain = base(Architecture::X86_64, Attributes::default());
        let merged = merge("[image]\nboot_mode = \"uefi\"\ntpm = \"v2.0\"\nimds = \"v2.0\"", &plain).unwrap();
        assert_eq!((merged.boot_mode, merged.tpm, merged.imds), (text("uefi"), text("v2.0"), text("v2.0")));
        let volume = merge("[disk]\nthroughput = 300", &plain).unwrap().root_volume;
        assert_eq!((volume.volume_type, volume.throughput), (text("gp3"), Some(300)));
        // arm64 always boots by UEFI, even if `boot_mode` is not set.
        let arm = base(Architecture::Arm64, Attributes::default());
        assert_eq!(merge("[image]\ntpm = \"v2.0\"", &arm).unwrap().tpm, text("v2.0"));
    }

    #[test]
    fn conflicts_are_rejected_with_their_line() {
        let plain = |architecture| base(architecture, Attributes::default());
        let (x86, arm) = (plain(Architecture::X86_64), plain(Architecture::Arm64));
        let full = base(Architecture::X86_64, whole());
        let gp2 = Attributes {
            root_volume: VolumeKind { volume_type: text("gp2"), ..VolumeKind::default() },
            ..Attributes::default()
        };
        let gp2 = base(Architecture::X86_64, gp2);
        let cases = [
            (
                "[image]\ntpm = \"v2.0\"",
                &x86,
                "3: `tpm` of [image] requires the boot mode \"uefi\", but ami-0123456789abcdef0 has \"legacy-bios\"",
            ),
            (
                "[image]\nena = true\nboot_mode = \"legacy-bios\"",
                &arm,
                "4: `boot_mode` of [image] is \"legacy-bios\", but ami-0123456789abcdef0 is an arm64 image",
            ),
            (
                "[image]\nboot_mode = \"uefi-preferred\"",
                &arm,
                "3: `boot_mode` of [image] is \"uefi-preferred\"",
            ),
            (
                "[image]\nboot_mode = \"legacy-bios\"",
                &full,
                "3: `boot_mode` of [image] is \"legacy-bios\", but ami-0123456789abcdef0 has a TPM",
            ),
            ("[disk]\nencrypted = false", &full, "3: `encrypted` of [disk] is false, but"),
            (
                "[disk]\niops = 3000",
                &gp2,
                "3: `iops` of [disk] cannot be set for type gp2, only for `gp3`, `io1` and `io2`",
            ),
            (
                "disk.throughput = 2001",
                &full,
                "2: `throughput` of [disk] is 2001: it must be 125 to 2000 MiB/s for type gp3",
            ),
        ];
        for (toml, base, expected) in cases {
            let error = merge(toml, base).unwrap_err();
            assert!(error.starts_with(&format!("DIR/web/image.toml:{expected}")), "{toml}\ngives {error}");
        }
        let both =
            merge("[image]\nboot_mode = \"legacy-bios\"\n[disk]\nencrypted = false", &full).unwrap_err();
        assert_eq!(both.lines().count(), 2, "{both}");
    }
}
