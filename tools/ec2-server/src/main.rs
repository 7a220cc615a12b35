//! `oven-ec2-server`: the server as a program, for a VM or for tests in another language.

use anyhow::{Context, Result, bail};
use clap::Parser;
use oven::ids::Architecture;
use oven_ec2_server::{
    AttachAs, Builder, Delays, Direct, DirectThrottle, Fault, Server, ServerOptions, Throttle,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// An EC2-shaped server on a local region.
#[derive(Parser)]
struct Args {
    /// The local region's directory
    #[arg(long)]
    region_dir: PathBuf,
    /// The address to listen on; port 0 selects a free port
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[arg(long, default_value = "us-east-1")]
    region: String,
    #[arg(long, default_value = "i-0123456789abcdef0")]
    instance_id: String,
    /// The zone of the instances; by default the region's first zone
    #[arg(long)]
    zone: Option<String>,
    /// The kind of device for an attached volume: nothing, loop, or qmp:SOCKET (an NVMe disk in that guest)
    #[arg(long, default_value = "nothing", value_parser = attach)]
    attach: AttachAs,
    /// An additional instance in the same zone: ID=ATTACH
    #[arg(long, value_parser = other)]
    instance: Vec<(String, AttachAs)>,
    /// Import a raw disk: NAME=RAW
    #[arg(long, value_parser = pair)]
    import: Vec<(String, String)>,
    /// An SSM parameter: NAME=VALUE
    #[arg(long, value_parser = pair)]
    parameter: Vec<(String, String)>,
    /// A plan of faults: a JSON list of {"action", "nth", "count", "dry_run", "what"}
    #[arg(long)]
    faults: Option<PathBuf>,
    /// Delays in milliseconds: {"creating": 500, "attaching": 300, ..}
    #[arg(long)]
    delays: Option<String>,
    /// Use latencies and delays like those of AWS; --delays and --latencies take precedence
    #[arg(long)]
    plausible: bool,
    /// Minimum and maximum latencies in milliseconds: {"PutSnapshotBlock": [15, 30], "Describe*": [80, 150]}
    #[arg(long)]
    latencies: Option<String>,
    /// Options of the EBS direct APIs: {"page": 100, "empty_pages": 2, "timeout": 500, ..}
    #[arg(long)]
    direct: Option<String>,
    /// A KMS key that may be used, in addition to alias/aws/ebs
    #[arg(long)]
    key: Vec<String>,
    /// The number of milliseconds for which a new id is not found
    #[arg(long, default_value_t = 0)]
    visibility_lag: u64,
    /// Throttle calls as EC2 and EBS do
    #[arg(long)]
    throttle: bool,
    /// An IAM policy; actions that it does not allow are refused
    #[arg(long)]
    policy: Option<PathBuf>,
    /// The number of seconds by which its clock is ahead of this machine's
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    clock_ahead: i64,
    /// The instances have no role
    #[arg(long)]
    no_role: bool,
    /// An action that is refused
    #[arg(long)]
    deny: Vec<String>,
    /// If not 0, delays are random, up to the set values
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Append every call to this file as a JSON object on one line
    #[arg(long)]
    record: Option<PathBuf>,
}

fn attach(text: &str) -> Result<AttachAs> {
    Ok(match (text, text.strip_prefix("qmp:")) {
        ("nothing", _) => AttachAs::Nothing,
        ("loop", _) => AttachAs::Loop,
        (_, Some(socket)) => AttachAs::Qmp(socket.into()),
        _ => bail!("there is nothing, loop and qmp:SOCKET"),
    })
}

fn pair(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').context("it has no =")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn other(text: &str) -> Result<(String, AttachAs)> {
    let (id, how) = pair(text)?;
    Ok((id, attach(&how)?))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let faults: Vec<Fault> = match &args.faults {
        Some(path) => {
            serde_json::from_slice(&read(path)?).with_context(|| format!("reading {}", path.display()))?
        }
        None => Vec::new(),
    };
    let delays: Delays = match &args.delays {
        Some(text) => serde_json::from_str(text).context("reading --delays")?,
        None => Delays::default(),
    };
    let policy = match &args.policy {
        Some(path) => Some(
            serde_json::from_slice(&read(path)?).with_context(|| format!("reading {}", path.display()))?,
        ),
        None => None,
    };
    let mut direct: Direct = match &args.direct {
        Some(text) => serde_json::from_str(text).context("reading --direct")?,
        None => Direct::default(),
    };
    if args.throttle && direct.throttle.is_none() {
        direct.throttle = Some(DirectThrottle::EBS);
    }
    let zone = args.zone.unwrap_or_else(|| format!("{}a", args.region));
    let others =
        args.instance.into_iter().map(|(id, attach)| Builder { id, zone: zone.clone(), attach }).collect();
    let options = ServerOptions {
        listen: args.listen,
        region: args.region,
        instance_id: args.instance_id,
        zone,
        attach: args.attach,
        others,
        delays,
        visibility_lag: Duration::from_millis(args.visibility_lag),
        throttle: args.throttle.then_some(Throttle::EC2),
        faults,
        denied: args.deny.into_iter().collect(),
        policy,
        parameters: args.parameter.into_iter().collect(),
        clock_ahead: args.clock_ahead,
        seed: args.seed,
        record: args.record,
        direct,
        ..ServerOptions::default()
    };
    let mut options = options;
    options.keys.extend(args.key);
    if args.plausible {
        options = options.plausible();
        if args.delays.is_some() {
            options.delays = delays;
        }
    }
    if let Some(text) = &args.latencies {
        let said: BTreeMap<String, (u64, u64)> = serde_json::from_str(text).context("reading --latencies")?;
        options.latencies.extend(said);
    }
    let options = if args.no_role { ServerOptions { role: None, ..options } } else { options };
    let others: Vec<String> = options.others.iter().map(|builder| builder.id.clone()).collect();
    let server = Server::start(&args.region_dir, options)?;
    for (name, raw) in args.import {
        let id = server.import(raw.as_ref(), &name, Architecture::HOST)?;
        println!("{id} {name}");
    }
    for id in others {
        println!("{id} {}", server.imds_of(&id).unwrap_or_default());
    }
    // This is the last line. It tells the reader that the server is ready.
    println!("{}", server.endpoint());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted?,
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}
