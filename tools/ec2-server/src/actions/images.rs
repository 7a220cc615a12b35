//! Images. A name is unique among the images of an account.

use super::{Ask, Ctx, View, shapes, snapshots, tag_specifications, volumes};
use crate::faults::Turn;
use crate::iam::Target;
use crate::params::Params;
use crate::refusal::{Result, no};
use crate::world::{Image, Kind, Mapping, Tags, Time, World, now};
use crate::xml::Xml;
use oven::ids::ImageId;
use std::rc::Rc;

/// The billing of an image that is registered from a snapshot, whatever the billing of the base is.
pub const LINUX: (&str, &str) = ("Linux/UNIX", "RunInstances");

fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
    if !(3..=128).contains(&name.chars().count()) || !name.chars().all(good) {
        no!(
            "InvalidAMIName.Malformed",
            "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', \
             '-', '/', '_', '[', ']', ' ', '@' and '''"
        );
    }
    Ok(())
}

fn one_of(value: Option<&String>, name: &str, allowed: &[&str]) -> Result<()> {
    match value {
        Some(value) if !allowed.contains(&value.as_str()) => {
            no!("InvalidParameterValue", "Value ({value}) for parameter {name} is invalid.")
        }
        _ => Ok(()),
    }
}

fn mapping(mut params: Params) -> Result<Option<Mapping>> {
    let device = params.required("DeviceName")?;
    let virtual_name = params.text("VirtualName");
    let none = params.text("NoDevice").is_some();
    let mut ebs = params.structure("Ebs");
    let mut mapping = Mapping { device, virtual_name, delete_on_termination: true, ..Mapping::default() };
    let is_ebs = ebs.is_some();
    if let Some(ebs) = &mut ebs {
        mapping.snapshot = ebs.text("SnapshotId");
        mapping.size = ebs.integer("VolumeSize")?;
        mapping.delete_on_termination = ebs.boolean("DeleteOnTermination")?.unwrap_or(true);
        let encrypted = ebs.boolean("Encrypted")?;
        if encrypted.is_some() && mapping.snapshot.is_some() {
            let device = &mapping.device;
            no!(
                "InvalidBlockDeviceMapping",
                "the encrypted flag cannot be specified since device {device} has a snapshot specified."
            );
        }
        mapping.kind = Kind {
            volume_type: ebs.text("VolumeType").unwrap_or_else(|| "gp2".into()),
            iops: ebs.integer("Iops")?,
            throughput: ebs.integer("Throughput")?,
            encrypted: encrypted.unwrap_or(false),
            key: ebs.text("KmsKeyId"),
        };
        ebs.done()?;
    }
    params.done()?;
    if mapping.virtual_name.as_ref().is_some_and(|name| !name.starts_with("ephemeral")) {
        no!("InvalidBlockDeviceMapping", "Invalid virtual name for device '{}'", mapping.device);
    }
    match (none, is_ebs, mapping.virtual_name.is_some()) {
        (true, false, false) => Ok(None),
        (false, true, false) | (false, false, true) => Ok(Some(mapping)),
        _ => no!(
            "InvalidBlockDeviceMapping",
            "Invalid device mapping for '{}': one of ebs, virtualName and noDevice",
            mapping.device
        ),
    }
}

/// Completes a mapping with data of its snapshot, and checks it.
fn complete(world: &World, account: &str, mapping: &mut Mapping, now: Time) -> Result<()> {
    if mapping.virtual_name.is_some() {
        return Ok(());
    }
    if let Some(id) = &mapping.snapshot {
        let snapshot = world.snapshot(id, now)?;
        if !snapshot.is_usable(account) {
            no!("InvalidSnapshot.NotFound", "The snapshot '{id}' does not exist.");
        }
        if snapshot.state(now) != "completed" {
            no!("IncorrectState", "Snapshot {id} is in invalid state - {}", snapshot.state(now));
        }
        let size = mapping.size.unwrap_or(snapshot.size);
        if size < snapshot.size {
            no!(
                "InvalidBlockDeviceMapping",
                "Volume of size {size}GB is smaller than snapshot '{id}', expect size >= {}GB",
                snapshot.size
            );
        }
        mapping.size = Some(size);
        mapping.kind.encrypted = snapshot.encrypted;
    }
    match mapping.size {
        None => no!("MissingParameter", "The request must contain the parameter size or snapshotId"),
        Some(size) => volumes::check_kind(&mut mapping.kind, size),
    }
}

pub fn register(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (name, description) = (p.required("Name")?, p.text("Description"));
    let tags = tag_specifications(p, "image")?;
    let mut mappings = Vec::new();
    for params in p.structures("BlockDeviceMapping")? {
        mappings.extend(mapping(params)?);
    }
    let billing = p.list("BillingProduct")?;
    let mut image = Image {
        name: name.clone(),
        description,
        // EC2's defaults, which are rarely wanted.
        architecture: p.text("Architecture").unwrap_or_else(|| "i386".into()),
        virtualization: p.text("VirtualizationType").unwrap_or_else(|| "paravirtual".into()),
        root_device_type: "ebs".into(),
        root_device: p.required("RootDeviceName")?,
        boot_mode: p.text("BootMode"),
        ena: p.boolean("EnaSupport")?,
        sriov: p.text("SriovNetSupport"),
        tpm: p.text("TpmSupport"),
        imds: p.text("ImdsSupport"),
        uefi_data: p.text("UefiData"),
        platform_details: LINUX.0.into(),
        usage_operation: LINUX.1.into(),
        ..Image::default()
    };
    check_name(&name)?;
    check(&image)?;
    let (mut state, now) = (ctx.state(), now());
    let none = Tags::new();
    let mut targets = vec![Target::made("image", &tags)];
    for id in mappings.iter().filter_map(|m| m.snapshot.as_ref()) {
        targets.push(Target::new(id, state.world.snapshots.get(id).map_or(&none, |s| &s.common.tags)));
    }
    ask.permitted(&state, &targets)?;
    if !billing.is_empty() {
        no!("AuthFailure", "The account is not authorized for the billing products {}", billing.join(", "));
    }
    for mapping in &mut mappings {
        complete(&state.world, &state.options.account, mapping, now)?;
        if let Some(snapshot) = mapping.snapshot.as_ref().and_then(|id| state.world.snapshots.get(id)) {
            image.product_codes.extend(snapshot.product_codes.iter().cloned());
        }
    }
    match mappings.iter().find(|m| m.device == image.root_device) {
        Some(root) if root.snapshot.is_some() => {}
        _ => no!(
            "InvalidBlockDeviceMapping",
            "The root device {} must be mapped to a snapshot",
            image.root_device
        ),
    }
    let ours = |other: &&Image| other.common.owner == state.options.account && !other.common.is_gone(now);
    // The name is in use even if the image is not visible yet or has failed.
    if let Some(holder) = state.world.images.values().filter(ours).find(|other| other.name == name) {
        no!("InvalidAMIName.Duplicate", "AMI name {name} is already in use by AMI {}", holder.common.id);
    }
    if state.world.images.values().filter(ours).filter(|i| !i.common.seeded).count()
        >= state.options.limits.images
    {
        no!("AMIQuotaExceeded", "You have reached the maximum number of AMIs.");
    }
    ask.really()?;
    image.mappings = mappings;
    match ask.turn {
        Some(Turn::Plain) => {
            (image.boot_mode, image.ena, image.sriov, image.tpm, image.imds) = (None, None, None, None, None);
            let root = image.root_device.clone();
            image.mappings.retain(|m| m.device == root);
        }
        Some(Turn::Billed) => {
            (image.platform_details, image.usage_operation) = ("Windows".into(), "RunInstances:0002".into());
        }
        _ => {}
    }
    let (id, delay) = (new_id(), state.options.delays.image);
    image.common = state.common(&id, tags, delay, ask.turn);
    state.change(|world| world.images.insert(id.clone(), image));
    let mut xml = Xml::default();
    xml.text("imageId", id);
    Ok(xml)
}

/// Returns a new id of the same form as the region's ids.
fn new_id() -> String {
    format!("ami-{}", &oven::ids::RunId::new().0[..17])
}

fn check(image: &Image) -> Result<()> {
    one_of(
        Some(&image.architecture),
        "architecture",
        &["i386", "x86_64", "arm64", "x86_64_mac", "arm64_mac"],
    )?;
    one_of(Some(&image.virtualization), "virtualizationType", &["hvm", "paravirtual"])?;
    one_of(image.boot_mode.as_ref(), "bootMode", &["legacy-bios", "uefi", "uefi-preferred"])?;
    one_of(image.tpm.as_ref(), "tpmSupport", &["v2.0"])?;
    one_of(image.imds.as_ref(), "imdsSupport", &["v2.0"])?;
    one_of(image.sriov.as_ref(), "sriovNetSupport", &["simple"])?;
    if image.description.as_ref().is_some_and(|text| text.chars().count() > 255) {
        no!("InvalidParameterValue", "Value for parameter description is longer than 255 characters");
    }
    let boot_mode = image.boot_mode.as_deref();
    if image.tpm.is_some() && boot_mode != Some("uefi") {
        no!("InvalidParameterCombination", "TPM support requires the boot mode uefi");
    }
    if image.architecture == "arm64" && boot_mode.is_some_and(|mode| mode != "uefi") {
        no!("InvalidParameterCombination", "The architecture arm64 requires the boot mode uefi");
    }
    if image.virtualization == "paravirtual" {
        if image.architecture == "arm64" {
            no!("InvalidParameterCombination", "The architecture arm64 requires the virtualization type hvm");
        }
        if image.ena == Some(true) || image.sriov.is_some() || image.boot_mode.is_some() {
            no!(
                "InvalidParameterCombination",
                "Enhanced networking and boot modes require the virtualization type hvm"
            );
        }
    }
    Ok(())
}

pub async fn deregister(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let id = ask.params.required("ImageId")?;
    let with_snapshots = ask.params.boolean("DeleteAssociatedSnapshots")?.unwrap_or(false);
    let doomed: Vec<String> = {
        let (state, now, none) = (ctx.state(), now(), Tags::new());
        let image = state.world.image(&id, now);
        ask.permitted(&state, &[Target::new(&id, image.as_ref().map_or(&none, |i| &i.common.tags))])?;
        if state.world.images.get(&id).is_some_and(|image| image.common.gone_at.is_some()) {
            no!("InvalidAMIID.Unavailable", "The image ID '{id}' is no longer available");
        }
        let image = image?;
        if image.common.owner != state.options.account {
            no!("AuthFailure", "Not authorized for image:{id}");
        }
        ask.really()?;
        image.mappings.iter().filter_map(|m| m.snapshot.clone()).filter(|_| with_snapshots).collect()
    };
    // An imported image is also in the region. For another image, this call fails without an effect.
    _ = ctx.region.deregister(&ImageId(id.clone())).await;
    ctx.state().change(|world| {
        if let Some(image) = world.images.get_mut(&id) {
            image.common.gone_at = Some(now());
        }
    });
    let mut results = Vec::new();
    for snapshot in doomed {
        let used = ctx.state().world.using(&snapshot, now()).next().is_some();
        let code = if used {
            "skipped"
        } else if snapshots::remove(ctx, &snapshot).await.is_ok() {
            "success"
        } else {
            "internal-error"
        };
        results.push((snapshot, code));
    }
    let mut xml = Xml::default();
    xml.text("return", true);
    if with_snapshots {
        xml.list("deleteSnapshotResultSet", results, |xml, (id, code)| {
            xml.text("snapshotId", id);
            xml.text("returnCode", code);
        });
    }
    Ok(xml)
}

pub fn attribute(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let (id, attribute) = (ask.params.required("ImageId")?, ask.params.required("Attribute")?);
    ask.params.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    let image = super::instances::owned(view, &id)?;
    ask.really()?;
    let mut xml = Xml::default();
    xml.text("imageId", &id);
    let mut value = |name: &str, value: Option<&String>| xml.nest(name, |xml| xml.some("value", value));
    match attribute.as_str() {
        "blockDeviceMapping" => shapes::mappings(&mut xml, &image.mappings),
        "bootMode" => value("bootMode", image.boot_mode.as_ref()),
        "description" => value("description", image.description.as_ref()),
        "imdsSupport" => value("imdsSupport", image.imds.as_ref()),
        "launchPermission" => {
            xml.list("launchPermission", image.public.then_some("all"), |xml, g| xml.text("group", g))
        }
        "productCodes" => xml.list("productCodes", &image.product_codes, |xml, code| {
            xml.text("productCode", code);
            xml.text("type", "marketplace");
        }),
        "sriovNetSupport" => value("sriovNetSupport", image.sriov.as_ref()),
        "tpmSupport" => value("tpmSupport", image.tpm.as_ref()),
        "uefiData" => value("uefiData", image.uefi_data.as_ref()),
        other => no!("InvalidParameterValue", "Value ({other}) for parameter attribute is invalid."),
    }
    Ok(xml)
}

/// Changes the description, or who may launch the image: everybody or only the owner.
pub fn modify(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let id = p.required("ImageId")?;
    let mut description = None;
    if let Some(mut given) = p.structure("Description") {
        description = given.text("Value");
        given.done()?;
    }
    let mut public = None;
    if let Some(mut permission) = p.structure("LaunchPermission") {
        for (list, to) in [("Add", true), ("Remove", false)] {
            for mut who in permission.structures(list)? {
                match (who.text("Group").as_deref(), who.text("UserId")) {
                    (Some("all"), None) => public = Some(to),
                    (None, Some(_)) => {}
                    _ => no!("InvalidParameterValue", "Invalid launch permission"),
                }
                who.done()?;
            }
        }
        permission.done()?;
    }
    let (mut state, none) = (ctx.state(), Tags::new());
    let image = state.world.image(&id, now()).cloned();
    ask.permitted(&state, &[Target::new(&id, image.as_ref().map_or(&none, |i| &i.common.tags))])?;
    if image?.common.owner != state.options.account {
        no!("AuthFailure", "Not authorized for image:{id}");
    }
    ask.really()?;
    state.change(|world| {
        if let Some(image) = world.images.get_mut(&id) {
            image.public = public.unwrap_or(image.public);
            image.description = description.or(image.description.take());
        }
    });
    let mut xml = Xml::default();
    xml.text("return", true);
    Ok(xml)
}
