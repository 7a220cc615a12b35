//! `oven images`.

use super::answer;
use crate::cli::{self, Global};
use crate::cloud::{Image, ImageId};
use crate::error::SUCCESS;
use crate::report::Report;
use crate::site::Site;
use anyhow::Result;
use serde_json::json;

pub async fn run(global: &Global, args: &cli::Images, report: &Report) -> Result<u8> {
    let site = Site::of(global, &[], report.clone())?;
    match args {
        cli::Images::List { name } => list(global, &site, name.as_deref()).await?,
        cli::Images::Show { id } => show(global, &site, &ImageId(id.clone())).await?,
    }
    Ok(SUCCESS)
}

async fn list(global: &Global, site: &Site, name: Option<&str>) -> Result<()> {
    let images = site.cloud.images(name).await?;
    if global.json {
        site.report.event(json!({"event": "result", "images": images}));
        return Ok(());
    }
    if images.is_empty() {
        site.report.note("no images: `oven import` makes a base image, `oven bake` the others");
    }
    for image in images {
        answer(line(&image));
    }
    Ok(())
}

fn line(image: &Image) -> String {
    format!(
        "{}  {:<9}  {:<6}  {:>4} GiB  {}  {}",
        image.id,
        format!("{:?}", image.state).to_lowercase(),
        image.architecture,
        image.size_gib,
        image.created,
        image.name
    )
}

async fn show(global: &Global, site: &Site, id: &ImageId) -> Result<()> {
    let (image, documents) = site.cloud.image(id).await?;
    if global.json {
        let mut object = serde_json::to_value(&image)?;
        object["event"] = json!("result");
        object["documents"] = json!(documents);
        site.report.event(object);
        return Ok(());
    }
    answer(line(&image));
    answer(format!("snapshot  {}", image.snapshot));
    if !image.description.is_empty() {
        answer(format!("about     {}", image.description));
    }
    for (key, value) in &image.tags {
        answer(format!("tag       {key} = {value}"));
    }
    if let Some(packages) = documents.get("packages") {
        answer("packages");
        for package in packages.lines() {
            answer(format!("  {}", package.replace('\t', "  ")));
        }
    }
    Ok(())
}
