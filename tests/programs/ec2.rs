//! A baker for the EC2 tests: the real story, through the real adapter, against the EC2-shaped server. Only two things
//! are not EC2's: the waits are short, and a volume is the loop device that the server made of it.
//!
//! usage: oven-test-ec2 DEFINITION
//!
//! Prints `image AMI`, and ends as `oven bake` would. In the environment: `AWS_*`; `OVEN_TEST_DIR`, the server's
//! directory; `OVEN_TEST_STATE`, for locks and logs, one for each host; `OVEN_TEST_SLOW`, to wait as for EC2;
//! `OVEN_TEST_CALL`, how many seconds a single call may take; `OVEN_TEST_TRACE`, a file for `--trace`.

mod nothing;

use anyhow::{Context, Result, ensure};
use oven::bake::batch::{Batch, BatchItem, bake_all};
use oven::bake::options::BakeOptions;
use oven::cli::stop_at_signals;
use oven::cloud::aws::ebs::Ebs;
use oven::cloud::aws::ec2::{Ec2, Ec2Options, Timeouts};
use oven::cloud::aws::imds;
use oven::config::overrides::Overrides;
use oven::config::project::{AWS, Settings};
use oven::definition::graph::BakeOrder;
use oven::device::Device;
use oven::disk::DiskStrategy;
use oven::disk::attached_disk::AttachedDisks;
use oven::disk::direct::DirectDisks;
use oven::disk::direct::server;
use oven::distros::PluginRegistry;
use oven::error::Kind;
use oven::ids::VolumeId;
use oven::report::{Level, Report, Style};
use oven::sandbox;
use oven::site::Site;
use oven::sys::{namespaces, private_tmpfs, signals, state_files};
use oven::trace::Trace;
use oven_debian::Debian;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
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
        runtime.block_on(run(Path::new(&args[0]))).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Kind::of(&error) as u8
        })
    }))
}

/// Fifty times as fast as for EC2; a single call may take as long as a busy machine needs, and what never ends is
/// given up after some of those.
fn timeouts() -> Timeouts {
    if std::env::var_os("OVEN_TEST_SLOW").is_some() {
        return Timeouts::default();
    }
    let call = std::env::var("OVEN_TEST_CALL").ok().and_then(|seconds| seconds.parse().ok());
    let fast = Timeouts::default().faster(50, call.map_or(Duration::from_secs(2), Duration::from_secs));
    let some = Duration::from_secs(8);
    Timeouts { snapshot: some, image: some, unreachable: some, ..fast }
}

/// The loop device that the server made of a volume.
fn device(dir: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    let note = dir.join("attached").join(format!("{volume}.json"));
    let note = match std::fs::read(&note) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("reading {}", note.display()))?,
    };
    let note: serde_json::Value = serde_json::from_slice(&note)?;
    let path = PathBuf::from(note["node"].as_str().context("no node")?);
    let node = File::options().read(true).write(true).open(&path)?;
    let rdev = node.metadata()?.rdev();
    // As strict as with NVMe: what was opened is what the server meant, and it holds this volume.
    ensure!(Some(rdev) == note["rdev"].as_u64(), "{} is another device: {note}", path.display());
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let file = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file"))?;
    let volumes = dir.join("volumes").join(format!("{volume}.img"));
    ensure!(Path::new(file.trim()) == volumes, "{} holds {file}, not {volume}", path.display());
    Ok(Some(Device { node: node.into(), path, rdev, serial: volume.0.replace('-', ""), trimming: None }))
}

async fn run(dir: &Path) -> Result<u8> {
    let of =
        |name: &str| std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set"));
    let (server, state) = (of("OVEN_TEST_DIR")?, of("OVEN_TEST_STATE")?);
    let trace = std::env::var_os("OVEN_TEST_TRACE").map(PathBuf::from);
    let file = trace.as_deref().map(|path| Trace::create(path, state_files::foreign_owner)).transpose()?;
    let report = Report::traced(Style::Human, Level::Normal, file);
    let stop = stop_at_signals(&report)?;
    let direct = std::env::var_os("OVEN_TEST_DIRECT").is_some();
    let here = match direct {
        true => None,
        false => {
            let asked = signals::run_until_stopped(
                &stop,
                imds::identify_instance(imds::InstanceOverrides::default()),
            )
            .await;
            Some(asked.context("asking which instance this is")?)
        }
    };
    let (region, instance_id, zone) =
        here.map(|here| (Some(here.region), Some(here.id), Some(here.zone))).unwrap_or_default();
    let cloud = Ec2::connect(Ec2Options {
        region,
        instance_id,
        zone,
        documents: state.join("aws"),
        devices: Rc::new(move |volume| device(&server, volume)),
        timeouts: timeouts(),
    })
    .await?;
    let overrides = Overrides { cloud: Some(AWS.into()), ..Overrides::default() };
    let settings = Settings::for_definition(dir)?.merge(&overrides)?;
    let helper = std::env::current_exe()?;
    let cloud = if direct { cloud.without_volumes() } else { cloud };
    let blocks = Rc::new(Ebs::new(cloud.clone()));
    let disks: Rc<dyn DiskStrategy> = match direct {
        true => Rc::new(DirectDisks::new(blocks.clone(), &state, settings.cache_gib, &helper, &report)),
        false => Rc::new(AttachedDisks::new(Rc::new(cloud.clone()))),
    };
    let site = Site {
        cloud: Rc::new(cloud),
        blocks,
        disks,
        distros: Rc::new(PluginRegistry::built_in(vec![Box::new(nothing::Nothing), Box::new(Debian)])),
        helper,
        scratch: private_tmpfs::DIR.into(),
        state,
        settings: Rc::new(settings),
        report: report.clone(),
    };
    let order = BakeOrder::load(&[dir])?;
    let batch = Batch { site, overrides, order, options: BakeOptions::default(), jobs: 1 };
    let all = bake_all(batch, stop).await;
    report.end_trace();
    for image in all.iter().filter_map(BatchItem::image) {
        println!("image {}", image.id);
    }
    let left = all.iter().any(|baked| !baked.leftovers.is_empty());
    Ok(match all.iter().find_map(BatchItem::error) {
        Some(error) => Kind::of(error) as u8,
        None if left => Kind::LeftBehind as u8,
        None => 0,
    })
}
