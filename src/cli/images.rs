//! `oven images`.

use super::{End, answer};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::{Image, tag};
use crate::ids::ImageId;
use crate::report::Report;
use crate::site::{Site, Use};
use crate::text::escape_name;
use anyhow::Result;
use serde_json::json;

pub async fn run(global: &GlobalArgs, args: &args::ImagesVerb, report: &Report) -> Result<End> {
    let site = Site::of(&global.overrides(), &[], report.clone(), Use::Looks).await?;
    match args {
        args::ImagesVerb::List { name } => list(global, &site, name.as_deref()).await,
        args::ImagesVerb::Show { id } => show(global, &site, &ImageId(id.clone())).await,
        args::ImagesVerb::Remove { ids } => remove(global, &site, ids).await,
    }
}

async fn list(global: &GlobalArgs, site: &Site, name: Option<&str>) -> Result<End> {
    let mut images = site.cloud.images(None).await?;
    let none = images.is_empty();
    if let Some(name) = name {
        images.retain(|image| image.name == name || image.tags.get(tag::NAME).is_some_and(|n| n == name));
    }
    match name {
        _ if !images.is_empty() => {}
        Some(name) if !none => {
            site.report
                .note(format!("no image has the name {name}, and no definition with this name has an image"));
        }
        _ if site.cloud.has_foreign_images() => {
            site.report.note("there are no images that oven baked: `oven bake` makes one")
        }
        _ => site.report.note(
            "there are no images: `oven import` makes a base image, and `oven bake` bakes images on it",
        ),
    }
    if !global.json {
        for image in &images {
            answer(line(image));
        }
    }
    Ok(End::success(json!({"images": images})))
}

fn line(image: &Image) -> String {
    format!(
        "{}  {:<9}  {:<6}  {:>4} GiB  {}  {}",
        image.id,
        format!("{:?}", image.state).to_lowercase(),
        image.architecture,
        image.size_gib,
        image.created,
        escape_name(&image.name)
    )
}

async fn show(global: &GlobalArgs, site: &Site, id: &ImageId) -> Result<End> {
    let (image, documents) = site.cloud.image(id).await?;
    let mut result = serde_json::to_value(&image)?;
    if !global.json {
        print(&image, documents.get("packages"));
    }
    result["documents"] = json!(documents);
    Ok(End::success(result))
}

fn print(image: &Image, packages: Option<&String>) {
    answer(line(image));
    answer(format!("snapshot  {}", image.snapshot));
    if !image.description.is_empty() {
        answer(format!("about     {}", escape_name(&image.description)));
    }
    for (key, value) in &image.tags {
        answer(format!("tag       {} = {}", escape_name(key), escape_name(value)));
    }
    if let Some(packages) = packages {
        answer("packages");
        for package in packages.lines() {
            answer(format!("  {}", escape_name(&package.replace('\t', "  "))));
        }
    }
}

/// Removes images. If one of them does not exist, none is removed.
async fn remove(global: &GlobalArgs, site: &Site, ids: &[String]) -> Result<End> {
    let mut images = Vec::new();
    for id in ids {
        images.push(site.cloud.image(&ImageId(id.clone())).await?.0);
    }
    for Image { id, name, snapshot, .. } in &images {
        site.cloud.remove(id, snapshot).await?;
        if !global.json {
            answer(format!("removed {id} ({}) and {snapshot}", escape_name(name)));
        }
    }
    Ok(End::success(json!({"removed": images})))
}
