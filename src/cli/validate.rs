//! `oven validate`: checks definitions and their settings. It needs neither root nor a cloud.

use super::{End, answer};
use crate::bake::target;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::config::project::Settings;
use crate::definition::Definition;
use crate::definition::graph::BakeOrder;
use crate::identity::fingerprint;
use crate::report::Report;
use crate::site;
use anyhow::{Error, Result};
use serde_json::json;

pub fn run(global: &GlobalArgs, args: &args::ValidateArgs, report: &Report) -> Result<End> {
    let order = match find(global, args, report) {
        Ok(order) => order,
        Err(errors) => {
            errors.iter().for_each(|error| report.failure(error));
            return Ok(End::failures(&errors));
        }
    };
    if !global.json {
        order.images.iter().for_each(|image| answer(format!("{}: valid", image.name)));
    }
    let images = order.images.iter().zip(&order.named).map(|(image, named)| {
        // Paths that are not UTF-8 cannot be in JSON as they are.
        json!({"name": image.name, "definition": image.dir.to_string_lossy(), "asked": named})
    });
    Ok(End::success(json!({"images": images.collect::<Vec<_>>()})))
}

/// Loads the definitions and their parents. Fails with the errors of all definitions and settings, so that one run
/// reports every mistake.
fn find(global: &GlobalArgs, args: &args::ValidateArgs, report: &Report) -> Result<BakeOrder, Vec<Error>> {
    let (order, images, mut errors) =
        match BakeOrder::load_or_list_wrong(&args.definitions, &args.vars.given()) {
            Ok(order) => (Some(order.clone()), order.images, Vec::new()),
            Err(failure) => {
                let errors = std::iter::once(failure.error).chain(failure.others);
                (None, failure.images, errors.collect())
            }
        };
    // Definitions often share an oven.toml, whose mistakes are reported once.
    let mut add = |error: Error| {
        if !errors.iter().any(|other| format!("{other:#}") == format!("{error:#}")) {
            errors.push(error);
        }
    };
    // The settings are also checked for definitions that could not be loaded, if their directories exist.
    let directories = args.definitions.iter().map(|directory| &**directory).filter(|dir| dir.is_dir());
    for directory in directories.chain(images.iter().map(|image| &*image.dir)) {
        Settings::resolve(directory, &global.overrides()).err().into_iter().for_each(&mut add);
    }
    let plugins = site::helper().and_then(|helper| site::plugins(&global.plugin, &helper));
    for image in &images {
        let named = plugins.as_ref().ok().zip(image.distro.as_deref());
        let plugin = named.map(|(plugins, id)| plugins.named(id, &image.place("distro", None)).map(|_| ()));
        let checks = [check_files(image, report), plugin.unwrap_or(Ok(()))];
        checks.into_iter().filter_map(Result::err).for_each(&mut add);
    }
    if let Err(error) = args.secrets.permitted().and_then(|permitted| permitted.ensure_permitted(&images)) {
        add(error);
    }
    if let Err(error) = plugins {
        add(error);
    }
    order.filter(|_| errors.is_empty()).ok_or(errors)
}

/// Reads all files of a definition. Warns of links that scripts cannot follow.
fn check_files(image: &Definition, report: &Report) -> Result<()> {
    target::check_links(report, image, &fingerprint::read_links(image)?)
}
