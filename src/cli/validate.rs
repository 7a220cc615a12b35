//! `oven validate`: checks definitions and their settings. It needs neither root nor a cloud.

use super::{End, answer};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::config::project::Settings;
use crate::definition::Definition;
use crate::definition::graph::BakeOrder;
use crate::identity::checksum::DefinitionTree;
use crate::report::Report;
use crate::site;
use anyhow::{Error, Result};
use serde_json::json;

pub fn run(global: &GlobalArgs, args: &args::ValidateArgs, report: &Report) -> Result<End> {
    let order = match find(global, args) {
        Ok(order) => order,
        Err(errors) => {
            errors.iter().for_each(|error| report.failure(error));
            return Ok(End::failures(&errors));
        }
    };
    if !global.json {
        order.images.iter().for_each(|image| answer(format!("{}: valid", image.name)));
    }
    let images = order.images.iter().zip(&order.named);
    let images =
        images.map(|(image, named)| json!({"name": image.name, "definition": image.dir, "asked": named}));
    Ok(End::success(json!({"images": images.collect::<Vec<_>>()})))
}

/// Loads the definitions and their parents. Fails with the errors of all definitions, so that one run reports every
/// mistake.
fn find(global: &GlobalArgs, args: &args::ValidateArgs) -> Result<BakeOrder, Vec<Error>> {
    let given = args.vars.given();
    let alone = args.definitions.iter().filter_map(|dir| Definition::load_with(dir, &given).err());
    let mut errors: Vec<_> = alone.collect();
    if !errors.is_empty() {
        return Err(errors);
    }
    let order = BakeOrder::load_with(&args.definitions, &given).map_err(|error| vec![error])?;
    // Definitions often share an oven.toml, whose mistakes are reported once.
    let mut add = |error: Error| {
        if !errors.iter().any(|other| format!("{other:#}") == format!("{error:#}")) {
            errors.push(error);
        }
    };
    let plugins = site::helper().and_then(|helper| site::plugins(&global.plugin, &helper));
    for image in &order.images {
        let settings = Settings::resolve(&image.dir, &global.overrides());
        let files = DefinitionTree::read_within(&image.directories(), &|_| Some(image.project.clone()));
        let named = plugins.as_ref().ok().zip(image.distro.as_deref());
        let plugin = named.map(|(plugins, id)| plugins.named(id, &image.place("distro", None)).map(|_| ()));
        let checks = [settings.map(|_| ()), files.map(|_| ()), plugin.unwrap_or(Ok(()))];
        checks.into_iter().filter_map(Result::err).for_each(&mut add);
    }
    if let Err(error) =
        args.secrets.permitted().and_then(|permitted| permitted.ensure_permitted(&order.images))
    {
        add(error);
    }
    if let Err(error) = plugins {
        add(error);
    }
    if errors.is_empty() { Ok(order) } else { Err(errors) }
}
