//! `oven plan`.

use super::{End, answer};
use crate::bake::options::Compat;
use crate::bake::secrets::PermittedSecrets;
use crate::bake::{preflight, target};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::{BaseRef, Image, tag};
use crate::definition::graph::BakeOrder;
use crate::definition::{BaseSource, Definition};
use crate::identity::fingerprint;
use crate::identity::fingerprint::PreviousInputs;
use crate::ids::ImageId;
use crate::report::Report;
use crate::site::{Site, Use};
use crate::text::escape_name;
use anyhow::Result;
use serde_json::json;
use std::collections::BTreeMap;

/// The existing image of a definition, or the reasons why a bake would make a new one.
struct Verdict {
    hit: Option<Image>,
    /// If there is no image yet, the reasons why a new one would be baked.
    why: Vec<String>,
}

pub async fn run(global: &GlobalArgs, args: &args::PlanArgs, report: &Report) -> Result<End> {
    let permitted = args.secrets.permitted()?;
    let order = BakeOrder::load_with(&args.definitions, &args.vars.given())?;
    let site = Site::of(&global.overrides(), &order.images, report.clone(), Use::Looks).await?;
    let compat = args.compat.map(Into::into);
    let mut objects = Vec::new();
    let mut hits: Vec<Option<ImageId>> = Vec::new();
    for (i, image) in order.images.iter().enumerate() {
        let site = site.for_image(&global.overrides(), image, report.clone())?;
        let verdict = match (&image.from, order.parent[i].map(|p| &hits[p])) {
            (BaseSource::Image(from), _) => judge(&site, image, from, compat).await?,
            (BaseSource::Parent(_), Some(Some(id))) => {
                judge(&site, image, &BaseRef::Id(id.clone()), compat).await?
            }
            (BaseSource::Parent(dir), _) => {
                target::check_links(&site, image, &fingerprint::read_links(image)?)?;
                let why = vec![format!("its parent {} will be baked first", escape_name(dir))];
                Verdict { hit: None, why }
            }
        };
        objects.push(json!({
            "name": image.name, "definition": image.dir.to_string_lossy(),
            "vars": image.vars.values(), "secrets": secrets(image),
            "permitted_secrets": secrets(image).into_keys().filter(|name| permitted.permits(name)).collect::<Vec<_>>(),
            "hit": verdict.hit.is_some(), "ami_id": verdict.hit.as_ref().map(|h| &h.id), "why": verdict.why,
        }));
        if !global.json {
            print(image, &verdict, &permitted);
        }
        hits.push(verdict.hit.map(|hit| hit.id));
    }
    Ok(End::success(json!({"images": objects})))
}

fn print(image: &Definition, verdict: &Verdict, permitted: &PermittedSecrets) {
    match &verdict.hit {
        Some(hit) => answer(format!("{}: already baked as {}", image.name, hit.id)),
        None => answer(format!("{}: to be baked", image.name)),
    }
    for why in &verdict.why {
        answer(format!("  {why}"));
    }
    for (name, value) in image.vars.values() {
        let source = if image.vars.given.contains_key(&name) { "--var" } else { "[vars]" };
        answer(format!("  with {name} = {value:?} ({source})"));
    }
    for (name, there) in secrets(image) {
        let there = match there {
            _ if !permitted.permits(&name) => format!("not permitted: a bake needs --secret {name}"),
            true => "in the environment".to_owned(),
            false => "not in the environment, but a bake needs it".to_owned(),
        };
        answer(format!("  with the secret {name} ({there})"));
    }
}

/// The names of the secrets that a bake needs, and whether they are set.
fn secrets(image: &Definition) -> BTreeMap<String, bool> {
    let names = image.runs.iter().chain(&image.tests).flat_map(|script| &script.secrets);
    names.map(|name| (name.clone(), std::env::var_os(name).is_some())).collect()
}

async fn judge(site: &Site, image: &Definition, from: &BaseRef, compat: Option<Compat>) -> Result<Verdict> {
    let base = target::base(site, image, from).await?;
    target::attributes(image, &base)?;
    let inputs = target::inputs(site, image, &base)?;
    if let Some(hit) = site.cloud.find(&target::key(&inputs, compat)).await? {
        return Ok(Verdict { hit: Some(hit), why: Vec::new() });
    }
    let name = target::name(image, &inputs, None);
    if let Some(holder) = preflight::name_holder(site, &name).await? {
        let why = format!(
            "{} is a failed or incomplete image with the name {name}: bake with --replace-failed",
            holder.id
        );
        return Ok(Verdict { hit: None, why: vec![why] });
    }
    let Some(newest) = site.cloud.images(Some(&image.name)).await?.pop() else {
        return Ok(Verdict {
            hit: None,
            why: vec![format!("no image of the definition `{}` exists yet", image.name)],
        });
    };
    let (newest, documents) = site.cloud.image(&newest.id).await?;
    let mut why = vec![format!("compared with {}, the newest image of this definition:", newest.id)];
    let tag = newest.tags.get(tag::INPUTS).map(String::as_str);
    match PreviousInputs::of(documents.get("inputs.json").map(String::as_str), tag) {
        Some(old) => {
            let mut lines = fingerprint::explain(&old, &inputs);
            if lines.is_empty() {
                lines.push(format!("nothing differs, but that image is {:?}", newest.state).to_lowercase());
            }
            why.extend(lines.into_iter().map(|line| format!("  {line}")));
        }
        None => why.push("  its inputs are unknown, because oven did not bake it".into()),
    }
    if image.name_is_default {
        why.push("image.toml has no `name`, so oven uses the directory's name. Set `name`, because the directory may \
                  have another name in another checkout".into());
    }
    Ok(Verdict { hit: None, why })
}
