//! Tags, and EC2's rules for them.

use super::{Ask, Ctx};
use crate::iam::Target;
use crate::params::Params;
use crate::refusal::{Result, no};
use crate::world::{Tags, Time, World, now};
use crate::xml::Xml;

/// Takes `Tag.1.Key`, `Tag.1.Value` and so on.
pub fn take(params: &mut Params) -> Result<Vec<(String, String)>> {
    let mut tags = Vec::new();
    for mut tag in params.structures("Tag")? {
        tags.push((tag.required("Key")?, tag.text("Value").unwrap_or_default()));
        tag.done()?;
    }
    Ok(tags)
}

/// Fails if there are more than 50 tags, a key has more than 128 characters, or a value has more than 256.
pub fn check(tags: &Tags) -> Result<()> {
    if tags.len() > 50 {
        no!("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.");
    }
    for (key, value) in tags {
        if key.chars().count() > 128 {
            no!("InvalidParameterValue", "Tag key exceeds the maximum length of 128 characters");
        }
        if value.chars().count() > 256 {
            no!("InvalidParameterValue", "Tag value exceeds the maximum length of 256 characters");
        }
        if key.to_ascii_lowercase().starts_with("aws:") {
            no!("InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use");
        }
    }
    Ok(())
}

/// Returns the tags and the owner of the resource with an id.
fn tags_of<'a>(world: &'a mut World, id: &str, now: Time) -> Result<(&'a mut Tags, &'a str)> {
    let common = match id.split_once('-').map_or("", |(prefix, _)| prefix) {
        "vol" => &mut world.volume_mut(id, now)?.common,
        "snap" => &mut world.snapshot_mut(id, now)?.common,
        "ami" => &mut world.image_mut(id, now)?.common,
        "i" => &mut world.instance_mut(id, now)?.common,
        _ => no!("InvalidID", "The ID '{id}' is not valid"),
    };
    Ok((&mut common.tags, &common.owner))
}

fn change(ctx: &Ctx, ask: &Ask, ids: &[String], change: impl Fn(&mut Tags) -> Result<()>) -> Result<Xml> {
    let mut state = ctx.state();
    let mut world = state.world.clone();
    if ids.is_empty() {
        no!("MissingParameter", "The request must contain the parameter resourceIdSet");
    }
    let none = Tags::new();
    for id in ids {
        let there = tags_of(&mut world, id, now());
        let tags = there.as_ref().map_or(&none, |(tags, _)| tags);
        ask.permitted(&state, &[Target::new(id, tags)])?;
        let (tags, owner) = there?;
        if owner != state.options.account {
            no!("UnauthorizedOperation", "You are not authorized to perform this operation.");
        }
        change(tags)?;
        check(tags)?;
    }
    ask.really()?;
    state.change(|now| *now = world);
    let mut xml = Xml::default();
    xml.text("return", true);
    Ok(xml)
}

pub fn create(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let (ids, tags) = (ask.params.list("ResourceId")?, take(&mut ask.params)?);
    if tags.is_empty() {
        no!("MissingParameter", "The request must contain the parameter tagSet");
    }
    change(ctx, &ask, &ids, |all| {
        all.extend(tags.iter().cloned());
        Ok(())
    })
}

/// Deletes tags, or all tags if none are given. A tag with a value is deleted only if it has this value. A tag without
/// a value is always deleted.
pub fn delete(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let ids = ask.params.list("ResourceId")?;
    let mut doomed = Vec::new();
    for mut tag in ask.params.structures("Tag")? {
        doomed.push((tag.required("Key")?, tag.text("Value")));
        tag.done()?;
    }
    change(ctx, &ask, &ids, |all| {
        let fits = |key: &str, value: &str| {
            doomed.iter().any(|(k, v)| k == key && v.as_deref().is_none_or(|v| v == value))
        };
        all.retain(|key, value| !doomed.is_empty() && !fits(key, value));
        Ok(())
    })
}
