//! A baker for the fault tests: the real story on a local region, with a fault at one cloud call.
//!
//! usage: oven-test-bake REGION_DIR DEFINITION \[FAULT\]...
//!
//! Prints `calls N` and `reads N`, `image AMI` of the definition and `parent AMI` of those it stands on; ends as
//! `oven bake` would. In the environment: `OVEN_TEST_FORCE` bakes with --force, `OVEN_TEST_STATE` is another directory
//! for locks, caches and what is written, as on another host; `OVEN_TEST_DIRECT` serves disks by their blocks, with
//! `whole` without a parent; `OVEN_TEST_PATIENCE`: so many milliseconds after its last block a snapshot fails;
//! `OVEN_TEST_READER` says what becomes of reading blocks: `fail:3` or `hang:3`, from the third on.

mod faulty;
mod nothing;

use anyhow::Result;
use faulty::{Fault, Faulty};
use oven::bake::batch::{Batch, BatchItem, bake_all};
use oven::bake::options::BakeOptions;
use oven::cli::stop_at_signals;
use oven::cloud::local::Region;
use oven::config::overrides::Overrides;
use oven::config::project::Settings;
use oven::definition::graph::BakeOrder;
use oven::disk::DiskStrategy;
use oven::disk::attached_disk::AttachedDisks;
use oven::disk::direct::DirectDisks;
use oven::disk::direct::server;
use oven::distros::PluginRegistry;
use oven::error::Kind;
use oven::report::{Level, Report, Style};
use oven::sandbox;
use oven::site::Site;
use oven::sys::{namespaces, private_tmpfs, signals};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|verb| verb == sandbox::VERB) {
        return sandbox::helper_main();
    }
    if args.first().is_some_and(|verb| verb == server::SERVER_VERB) {
        return server::helper_main();
    }
    ExitCode::from(signals::run_in_second_thread(move || {
        namespaces::private_mounts().and_then(|()| private_tmpfs::mount()).expect("root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run(&args)).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Kind::of(&error) as u8
        })
    }))
}

async fn run(args: &[String]) -> Result<u8> {
    let (region_dir, dir) = (PathBuf::from(&args[0]), PathBuf::from(&args[1]));
    let faults = args[2..].iter().map(|fault| fault.parse::<Fault>()).collect::<Result<_>>()?;
    let mut region = Region::open(&region_dir)?;
    if let Ok(patience) = std::env::var("OVEN_TEST_PATIENCE") {
        region = region.with_write_timeout(Duration::from_millis(patience.parse()?));
    }
    let direct = std::env::var("OVEN_TEST_DIRECT").ok();
    let faulty = Faulty::new(region, faults).whole(direct.as_deref() == Some("whole"));
    let faulty = Rc::new(faulty);
    let overrides = Overrides { region_dir: Some(region_dir.clone()), ..Overrides::default() };
    let settings = Settings::for_definition(&dir)?.merge(&overrides)?;
    let (report, helper) = (Report::new(Style::Human, Level::Normal), std::env::current_exe()?);
    let state = std::env::var_os("OVEN_TEST_STATE").map_or(region_dir, PathBuf::from);
    let disks: Rc<dyn DiskStrategy> = match direct {
        Some(_) => Rc::new(DirectDisks::new(faulty.clone(), &state, settings.cache_gib, &helper, &report)),
        None => Rc::new(AttachedDisks::new(faulty.clone())),
    };
    let site = Site {
        cloud: faulty.clone(),
        disks,
        distros: Rc::new(PluginRegistry::built_in(vec![Box::new(nothing::Nothing)])),
        helper,
        scratch: private_tmpfs::DIR.into(),
        state,
        settings: Rc::new(settings),
        report,
        blocks: faulty.clone(),
    };
    let force = std::env::var_os("OVEN_TEST_FORCE").is_some();
    let stop = stop_at_signals(&site.report)?;
    let order = BakeOrder::load(&[dir])?;
    let batch =
        Batch { site, overrides, order, options: BakeOptions { force, ..BakeOptions::default() }, jobs: 2 };
    let all = bake_all(batch, stop).await;
    println!("calls {}\nreads {}", faulty.calls(), faulty.reads());
    for baked in &all {
        if let Some(image) = baked.image() {
            println!("{} {}", if baked.asked { "image" } else { "parent" }, image.id);
        }
    }
    if let Some(error) = all.iter().find_map(BatchItem::error) {
        return Ok(Kind::of(error) as u8);
    }
    Ok(if all.iter().all(|baked| baked.leftovers.is_empty()) { 0 } else { Kind::LeftBehind as u8 })
}
