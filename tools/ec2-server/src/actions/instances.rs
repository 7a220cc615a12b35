//! Instances, zones and regions.

use super::describe::known;
use super::{Ask, Ctx, View, shapes};
use crate::filter::{Fields, Filters, Page};
use crate::iam::Target;
use crate::refusal::{Result, no};
use crate::world::{Instance, Tags, Volume, now};
use crate::xml::Xml;
use std::rc::Rc;

impl Fields for Instance {
    fn field(&self, name: &str) -> Option<Vec<String>> {
        let one = |value: &str| Some(vec![value.to_owned()]);
        match name {
            "instance-id" => one(&self.common.id),
            "instance-state-name" => one(&self.state),
            "availability-zone" => one(&self.zone),
            "instance-type" => one("m5.large"),
            _ => None,
        }
    }
    fn tags(&self) -> &Tags {
        &self.common.tags
    }
}

pub fn describe(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (ids, filters) = (p.list("InstanceId")?, Filters::take(p)?);
    let page = Page::take(p, &ids, (&filters, "instances"), 5)?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    filters.check(&Instance::default())?;
    let mut found = Vec::new();
    for id in &ids {
        found.push(view.world.instance(id, view.now)?);
    }
    if ids.is_empty() {
        found.extend(view.world.instances.values().filter(|i| i.common.is_visible(view.now)));
    }
    ask.really()?;
    found.retain(|instance| filters.fit(*instance));
    let (found, token) = page.cut(found, view.options.page);
    let mut xml = Xml::default();
    xml.list("reservationSet", found, |xml, instance| {
        xml.text("reservationId", format_args!("r-{}", &instance.common.id[2..]));
        xml.text("ownerId", &instance.common.owner);
        xml.list("instancesSet", [instance], |xml, i| shapes::instance(xml, i, view.world, view.options));
    });
    xml.some("nextToken", token);
    Ok(xml)
}

pub fn attribute(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let (id, attribute) = (ask.params.required("InstanceId")?, ask.params.required("Attribute")?);
    ask.params.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    let instance = view.world.instance(&id, view.now)?;
    ask.really()?;
    let mut xml = Xml::default();
    xml.text("instanceId", &id);
    let mut value = |name: &str, value: &str| xml.nest(name, |xml| xml.text("value", value));
    match attribute.as_str() {
        "blockDeviceMapping" => shapes::instance_mappings(&mut xml, instance, view.world),
        "instanceType" => value("instanceType", "m5.large"),
        "rootDeviceName" => value("rootDeviceName", "/dev/xvda"),
        "enaSupport" => value("enaSupport", "true"),
        "sriovNetSupport" => value("sriovNetSupport", "simple"),
        other => no!("InvalidParameterValue", "Value ({other}) for parameter attribute is invalid."),
    }
    Ok(xml)
}

/// Changes whether a volume is deleted with its instance. Only `BlockDeviceMapping` is supported.
pub fn modify(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let id = p.required("InstanceId")?;
    if let Some(attribute) = p.text("Attribute").filter(|a| a != "blockDeviceMapping") {
        no!("InvalidParameterValue", "Value ({attribute}) for parameter attribute is invalid.");
    }
    let mut mappings = Vec::new();
    for mut mapping in p.structures("BlockDeviceMapping")? {
        let device = mapping.required("DeviceName")?;
        let mut ebs = mapping.structure("Ebs").unwrap_or_default();
        mappings.push((device, ebs.text("VolumeId"), ebs.boolean("DeleteOnTermination")?));
        ebs.done()?;
        mapping.done()?;
    }
    if mappings.is_empty() {
        no!("InvalidParameterCombination", "No attributes specified.");
    }
    let mut state = ctx.state();
    let none = Tags::new();
    let tags = state.world.instance(&id, now()).map_or_else(|_| none.clone(), |i| i.common.tags.clone());
    let held = |v: &Volume, device: &str| {
        v.attachment.as_ref().is_some_and(|a| a.instance == id && a.device == device)
    };
    let mut targets = vec![Target::new(&id, &tags)];
    for volume in state.world.volumes.values() {
        if mappings.iter().any(|(device, ..)| held(volume, device)) {
            targets.push(Target::new(&volume.common.id, &volume.common.tags));
        }
    }
    ask.permitted(&state, &targets)?;
    state.world.instance(&id, now())?;
    let mut world = state.world.clone();
    for (device, volume, delete) in mappings {
        match world.volumes.values_mut().find(|volume| held(volume, &device)) {
            Some(found) if volume.as_ref().is_none_or(|id| *id == found.common.id) => {
                if let (Some(attachment), Some(delete)) = (&mut found.attachment, delete) {
                    attachment.delete_on_termination = delete;
                }
            }
            _ => no!("InvalidInstanceAttributeValue", "No device is currently mapped at {device}"),
        }
    }
    ask.really()?;
    state.change(|now| *now = world);
    let mut xml = Xml::default();
    xml.text("return", true);
    Ok(xml)
}

/// Terminates instances. Their attached volumes are deleted or become free.
pub async fn terminate(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let ids = ask.params.list("InstanceId")?;
    {
        let state = ctx.state();
        ask.permitted(&state, &[])?;
        for id in &ids {
            state.world.instance(id, now())?;
        }
        ask.really()?;
    }
    for id in &ids {
        crate::attach::terminate(ctx, id).await?;
    }
    let mut xml = Xml::default();
    xml.list("instancesSet", &ids, |xml, id| {
        xml.text("instanceId", id);
        for (name, state, code) in [("currentState", "shutting-down", 32), ("previousState", "running", 16)] {
            xml.nest(name, |xml| {
                xml.text("code", code);
                xml.text("name", state);
            });
        }
    });
    Ok(xml)
}

struct Place<'a>(&'a str, &'a str, Tags);

impl Fields for Place<'_> {
    fn field(&self, name: &str) -> Option<Vec<String>> {
        match name {
            "region-name" => Some(vec![self.0.to_owned()]),
            "zone-name" | "endpoint" => Some(vec![self.1.to_owned()]),
            "state" => Some(vec!["available".to_owned()]),
            "zone-type" => Some(vec!["availability-zone".to_owned()]),
            "opt-in-status" => Some(vec!["opt-in-not-required".to_owned()]),
            _ => None,
        }
    }
    fn tags(&self) -> &Tags {
        &self.2
    }
}

pub fn zones(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (names, filters) = (p.list("ZoneName")?, Filters::take(p)?);
    p.boolean("AllAvailabilityZones")?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    let (region, zones) = (&view.options.region, view.options.zones());
    filters.check(&Place(region, "", Tags::new()))?;
    if let Some(name) = names.iter().find(|name| !zones.contains(name)) {
        no!("InvalidParameterValue", "Invalid availability zone: [{name}]");
    }
    ask.really()?;
    let wanted = |zone: &&String| {
        (names.is_empty() || names.contains(zone)) && filters.fit(&Place(region, zone, Tags::new()))
    };
    let mut xml = Xml::default();
    xml.list("availabilityZoneInfo", zones.iter().filter(wanted), |xml, zone| {
        xml.text("optInStatus", "opt-in-not-required");
        xml.text("regionName", region);
        xml.text("zoneName", zone);
        xml.text("zoneId", format_args!("use1-az{}", if zone.ends_with('a') { 1 } else { 2 }));
        xml.text("groupName", region);
        xml.text("networkBorderGroup", region);
        xml.text("zoneType", "availability-zone");
        xml.text("zoneState", "available");
    });
    Ok(xml)
}

pub fn regions(view: &View<'_>, ask: &mut Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (names, filters) = (p.list("RegionName")?, Filters::take(p)?);
    p.boolean("AllRegions")?;
    p.done()?;
    crate::iam::permitted(view.options, &ask.action, &[])?;
    let region = &view.options.region;
    filters.check(&Place(region, "", Tags::new()))?;
    if let Some(name) = names.iter().find(|name| *name != region) {
        no!("InvalidParameterValue", "Invalid region names were found: ({name})");
    }
    ask.really()?;
    let endpoint = format!("ec2.{region}.amazonaws.com");
    let fits = filters.fit(&Place(region, &endpoint, Tags::new()));
    let mut xml = Xml::default();
    xml.list("regionInfo", fits.then_some(()), |xml, ()| {
        xml.text("regionName", region);
        xml.text("regionEndpoint", &endpoint);
        xml.text("optInStatus", "opt-in-not-required");
    });
    Ok(xml)
}

/// Returns an image if the account owns it. This is for [`super::images::attribute`], which only the owner may call.
pub fn owned<'a>(view: &View<'a>, id: &str) -> Result<&'a crate::world::Image> {
    let image = known(view, id)?;
    if image.common.owner != view.options.account {
        no!("AuthFailure", "Not authorized for image:{id}");
    }
    Ok(image)
}
