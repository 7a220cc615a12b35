//! Inherits an image's attributes from its base, and checks them before anything is created.

use super::{Attributes, VolumeKind};
use crate::error::Kind;
use crate::ids::Architecture;
use anyhow::Result;
use std::collections::BTreeSet;

/// The volume types of EC2, and whether each accepts IOPS and a throughput.
const TYPES: &[(&str, bool, bool)] = &[
    ("gp2", false, false),
    ("gp3", true, true),
    ("io1", true, false),
    ("io2", true, false),
    ("sc1", false, false),
    ("st1", false, false),
    ("standard", false, false),
];

/// Returns whether volumes of this type accept IOPS, and whether they accept a throughput. Both values are true if the
/// type is unknown or unset.
pub fn accepted_performance(volume_type: Option<&str>) -> (bool, bool) {
    let known = TYPES.iter().find(|(name, ..)| Some(*name) == volume_type);
    known.map_or((true, true), |(_, iops, throughput)| (*iops, *throughput))
}

/// Rejects values that EC2 does not know and combinations that EC2 does not accept.
pub fn check(attributes: &Attributes, architecture: Architecture) -> Result<()> {
    let reject = |text: String, hint: &str| Err(Kind::Definition.failure(text).hint(hint).into());
    let check_word = |what: &str, value: &Option<String>, known: &[&str]| match value {
        Some(value) if !known.contains(&value.as_str()) => {
            let known = known.join(", ");
            Err(Kind::Definition.error(format!("{what} = {value:?} is not one of: {known}")))
        }
        _ => Ok(()),
    };
    check_word("boot_mode", &attributes.boot_mode, &["legacy-bios", "uefi", "uefi-preferred"])?;
    check_word("tpm", &attributes.tpm, &["v2.0"])?;
    check_word("imds", &attributes.imds, &["v2.0"])?;
    check_word("sriov", &attributes.sriov, &["simple"])?;
    let boot_mode = match (&attributes.boot_mode, architecture) {
        (Some(mode), _) => mode,
        (None, Architecture::X86_64) => "legacy-bios",
        (None, Architecture::Arm64) => "uefi",
    };
    if architecture == Architecture::Arm64 && boot_mode != "uefi" {
        return reject(
            format!("an arm64 image cannot boot with boot_mode = {boot_mode:?}"),
            "Set boot_mode = \"uefi\", or leave it out.",
        );
    }
    if attributes.tpm.is_some() && boot_mode != "uefi" {
        let text = format!(
            "tpm = \"v2.0\" requires boot_mode = \"uefi\", but this image has boot_mode = {boot_mode:?}"
        );
        return reject(
            text,
            "Set boot_mode = \"uefi\" if the image can boot that way, or use a base that has boot_mode = \"uefi\".",
        );
    }
    check_volume_kind(&attributes.root_volume, "the root volume")?;
    let mut devices = BTreeSet::new();
    for mapping in &attributes.mappings {
        if !devices.insert(&mapping.device) {
            return reject(format!("{} is mapped twice", mapping.device), "Map each device once.");
        }
        check_volume_kind(&mapping.kind, &mapping.device)?;
    }
    Ok(())
}

/// Checks a volume's type, IOPS, throughput and key. `what` names the volume in errors.
pub fn check_volume_kind(kind: &VolumeKind, what: &str) -> Result<()> {
    let reject = |text: String| Err(Kind::Definition.error(format!("{what}: {text}")));
    let volume_type = kind.volume_type.as_deref();
    if let Some(name) = volume_type {
        let Some((_, iops, throughput)) = TYPES.iter().find(|(known, ..)| *known == name) else {
            let known: Vec<&str> = TYPES.iter().map(|(name, ..)| *name).collect();
            return reject(format!("unknown volume type {name:?}; the valid types are {}", known.join(", ")));
        };
        if kind.iops.is_some() && !iops {
            return reject(format!("a volume of type {name} does not accept iops"));
        }
        if kind.throughput.is_some() && !throughput {
            return reject(format!("a volume of type {name} does not accept throughput"));
        }
        if name.starts_with("io") && kind.iops.is_none() {
            return reject(format!("a volume of type {name} needs iops"));
        }
    } else if kind.iops.is_some() || kind.throughput.is_some() {
        return reject("iops and throughput require a volume type, such as gp3".to_owned());
    }
    if kind.kms_key.is_some() && kind.encrypted != Some(true) {
        return reject("`kms_key` requires `encrypted = true`".to_owned());
    }
    Ok(())
}

/// Returns the attributes of a new image. `wanted` contains the attributes that the image's definition sets. All others
/// come from the base. There are two exceptions. If the definition sets `encrypted`, the base's KMS key is not
/// inherited. If the definition changes the volume type, the base's IOPS and throughput are not inherited, because they
/// may be invalid for the new type.
pub fn inherit(base: &Attributes, wanted: &Attributes) -> Attributes {
    let or = |wanted: &Option<String>, base: &Option<String>| wanted.clone().or_else(|| base.clone());
    Attributes {
        boot_mode: or(&wanted.boot_mode, &base.boot_mode),
        ena: wanted.ena.or(base.ena),
        sriov: or(&wanted.sriov, &base.sriov),
        tpm: or(&wanted.tpm, &base.tpm),
        imds: or(&wanted.imds, &base.imds),
        root_volume: inherit_kind(&base.root_volume, &wanted.root_volume),
        mappings: if wanted.mappings.is_empty() { base.mappings.clone() } else { wanted.mappings.clone() },
        billing: wanted.billing.clone().or_else(|| base.billing.clone()),
    }
}

fn inherit_kind(base: &VolumeKind, wanted: &VolumeKind) -> VolumeKind {
    let same_type = wanted.volume_type.is_none() || wanted.volume_type == base.volume_type;
    VolumeKind {
        volume_type: wanted.volume_type.clone().or_else(|| base.volume_type.clone()),
        iops: wanted.iops.or(base.iops.filter(|_| same_type)),
        throughput: wanted.throughput.or(base.throughput.filter(|_| same_type)),
        encrypted: wanted.encrypted.or(base.encrypted),
        kms_key: wanted
            .kms_key
            .clone()
            .or_else(|| base.kms_key.clone().filter(|_| wanted.encrypted.is_none())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Mapping;
    use Architecture::{Arm64, X86_64};

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn combinations() {
        let none = Attributes::default();
        let with =
            |boot_mode: Option<String>, tpm: Option<String>| Attributes { boot_mode, tpm, ..none.clone() };
        for (attributes, architecture, wrong) in [
            (none.clone(), X86_64, ""),
            (none.clone(), Arm64, ""),
            (with(some("uefi"), some("v2.0")), X86_64, ""),
            (with(None, some("v2.0")), Arm64, ""),
            (with(None, some("v2.0")), X86_64, "requires boot_mode = \"uefi\""),
            (with(some("legacy-bios"), some("v2.0")), X86_64, "requires boot_mode = \"uefi\""),
            (with(some("uefi-preferred"), some("v2.0")), X86_64, "requires boot_mode = \"uefi\""),
            (with(some("legacy-bios"), None), Arm64, "cannot boot with boot_mode = \"legacy-bios\""),
            (with(some("bios"), None), X86_64, "not one of"),
            (with(some("uefi"), some("v1.2")), X86_64, "not one of"),
            (Attributes { imds: some("v1"), ..none.clone() }, X86_64, "not one of"),
            (Attributes { sriov: some("yes"), ..none.clone() }, X86_64, "not one of"),
            (
                Attributes {
                    mappings: vec![Mapping { device: "/dev/sdb".into(), ..Default::default() }; 2],
                    ..none.clone()
                },
                X86_64,
                "mapped twice",
            ),
        ] {
            let text = check(&attributes, architecture).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains(wrong) && text.is_empty() == wrong.is_empty(), "{attributes:?}: {text}");
        }
    }

    #[test]
    fn kinds() {
        let kind = |volume_type: &str, iops, throughput| VolumeKind {
            volume_type: some(volume_type),
            iops,
            throughput,
            ..Default::default()
        };
        let keyed = |encrypted| VolumeKind { kms_key: some("alias/k"), encrypted, ..Default::default() };
        for (kind, wrong) in [
            (VolumeKind::default(), ""),
            (kind("gp3", Some(4000), Some(250)), ""),
            (kind("io2", Some(4000), None), ""),
            (kind("io2", None, None), "needs iops"),
            (kind("gp2", Some(100), None), "does not accept iops"),
            (kind("io1", Some(100), Some(125)), "does not accept throughput"),
            (kind("gp4", None, None), "unknown volume type"),
            (VolumeKind { iops: Some(1), ..Default::default() }, "require a volume type"),
            (keyed(Some(true)), ""),
            (keyed(None), "requires `encrypted"),
            (keyed(Some(false)), "requires `encrypted"),
        ] {
            let text = check_volume_kind(&kind, "it").err().map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains(wrong) && text.is_empty() == wrong.is_empty(), "{kind:?}: {text}");
        }
    }

    #[test]
    fn the_definition_wins_and_the_rest_is_inherited() {
        let gp3 = VolumeKind {
            volume_type: some("gp3"),
            iops: Some(3000),
            throughput: Some(125),
            ..Default::default()
        };
        let base = Attributes {
            ena: Some(true),
            boot_mode: some("uefi"),
            root_volume: gp3.clone(),
            ..Default::default()
        };
        assert_eq!(inherit(&base, &Attributes::default()), base);
        let wanted = Attributes {
            boot_mode: some("uefi-preferred"),
            root_volume: VolumeKind { volume_type: some("gp2"), ..Default::default() },
            ..Default::default()
        };
        let both = inherit(&base, &wanted);
        assert_eq!((both.boot_mode.as_deref(), both.ena), (Some("uefi-preferred"), Some(true)));
        assert_eq!(both.root_volume, wanted.root_volume);
    }
}
