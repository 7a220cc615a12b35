//! DescribeVolumes, DescribeSnapshots, DescribeImages.

use super::{Ask, View, shapes};
use crate::filter::{Fields, Filters, Page};
use crate::refusal::{Result, no, refuse};
use crate::world::{Image, Snapshot, Tags, Time, Volume, rfc3339};
use crate::xml::Xml;

/// A record, and the time at which it is read.
struct At<'a, T>(&'a T, Time);

fn one(value: impl ToString) -> Option<Vec<String>> {
    Some(vec![value.to_string()])
}

fn some(value: Option<impl ToString>) -> Option<Vec<String>> {
    Some(value.iter().map(ToString::to_string).collect())
}

impl Fields for At<'_, Volume> {
    fn field(&self, name: &str) -> Option<Vec<String>> {
        let At(volume, now) = self;
        let attachment = volume.attachment.as_ref();
        match name {
            "attachment.attach-time" => some(attachment.map(|a| rfc3339(a.since))),
            "attachment.delete-on-termination" => some(attachment.map(|a| a.delete_on_termination)),
            "attachment.device" => some(attachment.map(|a| &a.device)),
            "attachment.instance-id" => some(attachment.map(|a| &a.instance)),
            "attachment.status" => some(attachment.map(|a| a.phase.as_str())),
            "availability-zone" => one(&volume.zone),
            "create-time" => one(rfc3339(volume.common.created)),
            "encrypted" => one(volume.kind.encrypted),
            "multi-attach-enabled" => one(false),
            "size" => one(volume.size),
            "snapshot-id" => one(&volume.snapshot),
            "status" => one(volume.state(*now)),
            "volume-id" => one(&volume.common.id),
            "volume-type" => one(&volume.kind.volume_type),
            _ => None,
        }
    }
    fn tags(&self) -> &Tags {
        &self.0.common.tags
    }
}

impl Fields for At<'_, Snapshot> {
    fn field(&self, name: &str) -> Option<Vec<String>> {
        let At(snapshot, now) = self;
        match name {
            "description" => one(&snapshot.description),
            "encrypted" => one(snapshot.encrypted),
            "owner-alias" => some(None::<String>),
            "owner-id" => one(&snapshot.common.owner),
            "progress" => one(shapes::progress(snapshot, *now)),
            "snapshot-id" => one(&snapshot.common.id),
            "start-time" => one(rfc3339(snapshot.common.created)),
            "status" => one(snapshot.state(*now)),
            "storage-tier" => one("standard"),
            "volume-id" => one(&snapshot.volume),
            "volume-size" => one(snapshot.size),
            _ => None,
        }
    }
    fn tags(&self) -> &Tags {
        &self.0.common.tags
    }
}

impl Fields for At<'_, Image> {
    fn field(&self, name: &str) -> Option<Vec<String>> {
        let At(image, now) = self;
        let mapped = |get: fn(&crate::world::Mapping) -> Option<String>| {
            Some(image.mappings.iter().filter_map(get).collect())
        };
        match name {
            "architecture" => one(&image.architecture),
            "block-device-mapping.delete-on-termination" => {
                mapped(|m| Some(m.delete_on_termination.to_string()))
            }
            "block-device-mapping.device-name" => mapped(|m| Some(m.device.clone())),
            "block-device-mapping.encrypted" => mapped(|m| Some(m.kind.encrypted.to_string())),
            "block-device-mapping.snapshot-id" => mapped(|m| m.snapshot.clone()),
            "block-device-mapping.volume-size" => mapped(|m| m.size.map(|size| size.to_string())),
            "block-device-mapping.volume-type" => mapped(|m| Some(m.kind.volume_type.clone())),
            "creation-date" => one(rfc3339(image.common.created)),
            "description" => some(image.description.as_ref()),
            "ena-support" => some(image.ena),
            "hypervisor" => one("xen"),
            "image-id" => one(&image.common.id),
            "image-type" => one("machine"),
            "is-public" => one(image.public),
            "kernel-id" | "manifest-location" | "ramdisk-id" | "platform" => some(None::<String>),
            "name" => one(&image.name),
            "owner-alias" => some(image.owner_alias.as_ref()),
            "owner-id" => one(&image.common.owner),
            "product-code" => Some(image.product_codes.clone()),
            "product-code.type" => {
                Some(image.product_codes.iter().map(|_| "marketplace".to_owned()).collect())
            }
            "root-device-name" => one(&image.root_device),
            "root-device-type" => one(&image.root_device_type),
            "state" => one(image.state(*now)),
            "state-reason-code" | "state-reason-message" => some(None::<String>),
            "sriov-net-support" => some(image.sriov.as_ref()),
            "virtualization-type" => one(&image.virtualization),
            _ => None,
        }
    }
    fn tags(&self) -> &Tags {
        &self.0.common.tags
    }
}

pub fn volumes(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (ids, filters) = (p.list("VolumeId")?, Filters::take(p)?);
    let page = Page::take(p, &ids, (&filters, "volumes"), 5)?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    filters.check(&At(&Volume::default(), 0))?;
    let mut found = Vec::new();
    for id in &ids {
        found.push(view.world.volume(id, view.now)?);
    }
    if ids.is_empty() {
        found.extend(view.world.volumes.values().filter(|v| v.common.is_visible(view.now)));
    }
    ask.really()?;
    found.retain(|volume| filters.fit(&At(*volume, view.now)));
    let (found, token) = page.cut(found, view.options.page);
    let mut xml = Xml::default();
    xml.list("volumeSet", found, |xml, volume| shapes::volume(xml, volume, view.now));
    xml.some("nextToken", token);
    Ok(xml)
}

/// Returns whether the account encrypts every new volume and snapshot.
pub fn encryption(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    ask.params.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    ask.really()?;
    let mut xml = Xml::default();
    xml.text("ebsEncryptionByDefault", view.options.direct.encrypts);
    Ok(xml)
}

pub fn snapshots(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (ids, filters) = (p.list("SnapshotId")?, Filters::take(p)?);
    let (owners, restorable) = (p.list("Owner")?, p.list("RestorableBy")?);
    let page = Page::take(p, &ids, (&filters, &owners, &restorable), 5)?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    filters.check(&At(&Snapshot::default(), 0))?;
    let account = &view.options.account;
    let ours = |snapshot: &Snapshot| snapshot.common.owner == *account;
    let mut found = Vec::new();
    for id in &ids {
        let snapshot = view.world.snapshot(id, view.now)?;
        if !snapshot.is_usable(account) {
            no!("InvalidSnapshot.NotFound", "The snapshot '{id}' does not exist.");
        }
        found.push(snapshot);
    }
    if ids.is_empty() {
        let all = view.world.snapshots.values().filter(|s| s.common.is_visible(view.now));
        found.extend(all.filter(|s| s.is_usable(account)));
    }
    ask.really()?;
    let owned = |s: &Snapshot, who: &str| (who == "self" && ours(s)) || who == s.common.owner;
    found.retain(|s| owners.is_empty() || owners.iter().any(|who| owned(s, who)));
    let may =
        |s: &Snapshot, who: &str| s.public || (s.is_usable(account) && (who == "self" || who == account));
    found.retain(|s| restorable.is_empty() || restorable.iter().any(|who| may(s, who)));
    found.retain(|snapshot| filters.fit(&At(*snapshot, view.now)));
    let (found, token) = page.cut(found, view.options.page);
    let mut xml = Xml::default();
    xml.list("snapshotSet", found, |xml, snapshot| shapes::snapshot(xml, snapshot, view.now));
    xml.some("nextToken", token);
    Ok(xml)
}

/// Returns the image if the account may see it.
pub fn known<'a>(view: &View<'a>, id: &str) -> Result<&'a Image> {
    let image = view.world.image(id, view.now)?;
    let ours = image.common.owner == view.options.account;
    if !ours && (image.disabled || !(image.public || image.shared)) {
        return Err(refuse("AuthFailure", format!("Not authorized for images: [{id}]")));
    }
    Ok(image)
}

pub fn images(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (ids, filters) = (p.list("ImageId")?, Filters::take(p)?);
    let (owners, executable) = (p.list("Owner")?, p.list("ExecutableBy")?);
    let deprecated = p.boolean("IncludeDeprecated")?.unwrap_or(false);
    let disabled = p.boolean("IncludeDisabled")?.unwrap_or(false);
    let page = Page::take(p, &ids, (&filters, &owners, &executable, deprecated, disabled), 1)?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    filters.check(&At(&Image::default(), 0))?;
    let account = &view.options.account;
    for owner in &owners {
        let is_account = owner.len() == 12 && owner.bytes().all(|b| b.is_ascii_digit());
        if !is_account && !["self", "amazon", "aws-marketplace", "aws-backup-vault"].contains(&owner.as_str())
        {
            no!("InvalidUserID.Malformed", "Invalid user id: \"{owner}\"");
        }
    }
    let mut found = Vec::new();
    for id in &ids {
        found.push(known(view, id)?);
    }
    if ids.is_empty() {
        let now = rfc3339(view.now);
        let all = view.world.images.values().filter(|image| image.common.is_visible(view.now));
        let listed = |image: &&Image| {
            let ours = image.common.owner == *account;
            let old = image.deprecation.as_ref().is_some_and(|time| *time <= now);
            (ours || ((image.public || image.shared) && (deprecated || !old)))
                && (disabled || !image.disabled)
        };
        found.extend(all.filter(listed));
    }
    ask.really()?;
    let owned = |image: &Image, who: &str| {
        (who == "self" && image.common.owner == *account)
            || who == image.common.owner
            || image.owner_alias.as_deref() == Some(who)
    };
    found.retain(|image| owners.is_empty() || owners.iter().any(|who| owned(image, who)));
    let may = |image: &Image, who: &str| match who {
        "all" => image.public,
        "self" => image.shared,
        who => who == account && image.shared,
    };
    found.retain(|image| executable.is_empty() || executable.iter().any(|who| may(image, who)));
    found.retain(|image| filters.fit(&At(*image, view.now)));
    let (found, token) = page.cut(found, view.options.page);
    let mut xml = Xml::default();
    xml.list("imagesSet", found, |xml, image| shapes::image(xml, image, view.now));
    xml.some("nextToken", token);
    Ok(xml)
}
