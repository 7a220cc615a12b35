//! What a step cannot do to this machine.

use super::limits::may_set_a_minimum;
use super::{HELPER, Loop, NONE, marker, mounted, processes, run, with_program};
use oven::device::DeviceNode;
use oven::sandbox::spec::ExitStatus;
use oven_testing::BusyboxImage;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::process::Command;

/// How many attempts `attack.c` makes. `docs/explain/security.md` says so.
const ATTEMPTS: usize = 111;

/// Of the kernel.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Sleepers instead of a real bomb: as many processes, without the load on whoever shares this machine.
#[test]
fn a_fork_bomb_stays_in_its_step() {
    if kernel() < (6, 14) {
        return; // the limit belongs to a PID namespace since then
    }
    let image = BusyboxImage::new();
    let marker = &marker("bomb-1");
    let mut spec = image.shell("i=0; while [ $i -lt 6000 ]; do sleep 100 & i=$((i+1)); done; echo all");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, lines) = run(&spec);
    assert!(matches!(exit.status, ExitStatus::Exited(1..)), "{exit:?}");
    assert!(lines.iter().any(|line| line.contains("can't fork")), "{lines:?}");
    assert_eq!(exit.surviving_processes.len(), 32, "so many are named");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn attacks_are_refused() {
    let image = with_program("attack.c", &[], "attack");
    let host = tempfile::tempdir().unwrap();
    let canary = host.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    let host_disk = Loop::new(1);
    let disk = host_disk.rdev();
    fs::File::open(&host_disk.node).expect("this machine's root may open it");
    let numbers = [rustix::fs::major(disk), rustix::fs::minor(disk)].map(|number| number.to_string());
    // A device node that the image brought along.
    let planted = image.path("root/planted-disk");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &planted,
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR,
        disk,
    )
    .unwrap();
    // What a step must not find anywhere.
    let secret = "AWS-SECRET-7f3a";
    let mut holder = Command::new("sleep").arg("100").env("AWS_SECRET_ACCESS_KEY", secret).spawn().unwrap();
    let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
        "oven-step-test",
    )
    .unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();

    let host_pid = std::process::id().to_string();
    let argv = ["attack", &host_pid, canary.to_str().unwrap(), &numbers[0], &numbers[1], secret];
    // Landlock has scopes since 6.12; before, a step with the network reaches such sockets.
    let scopes = kernel() >= (6, 12);
    let (mut made, mut refused) = (0, 0);
    for (network, throwaway) in [(false, false), (true, false), (false, true)] {
        let mut spec = image.spec(&argv);
        (spec.network, spec.throwaway) = (network, throwaway);
        spec.nodes = vec![DeviceNode { name: "image".into(), rdev: disk, links: vec![] }];
        if !may_set_a_minimum() {
            spec.env.insert("NO_MINIMUM".into(), "1".into());
        }
        let (exit, lines) = run(&spec);
        let mut allowed = lines.clone();
        allowed.retain(|line| {
            !line.starts_with("refused ") && (scopes || !line.ends_with(" host_abstract_socket"))
        });
        assert!(allowed.is_empty(), "network {network}, throwaway {throwaway}: {allowed:#?}");
        assert!(exit.status.success() || !scopes, "{exit:?}");
        assert_eq!(lines.len(), ATTEMPTS, "every attempt was made");
        made += lines.len();
        refused += lines.iter().filter(|line| line.starts_with("refused ")).count();
    }
    println!("{made} attempts in three kinds of steps, {refused} refused");
    let docs = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/explain/security.md")).unwrap();
    assert!(docs.contains(&format!(" {ATTEMPTS} attempts")), "the page states another number");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(fs::read(&canary).unwrap(), b"alive");
}

/// An image whose dynamic loader is the attacker: it runs *as* the host's program, by `/proc/self/exe`.
#[test]
fn the_hosts_program_cannot_be_changed_through_proc() {
    let image = with_program("loader.c", &["-nostdlib", "-nostartfiles"], "loader");
    for loader in ["lib64/ld-linux-x86-64.so.2", "lib/ld-linux-aarch64.so.1"] {
        fs::create_dir_all(image.path(loader).parent().unwrap()).unwrap();
        fs::copy(image.path("bin/loader"), image.path(loader)).unwrap();
    }
    let before = fs::metadata(HELPER).unwrap();
    let (exit, lines) = run(&image.spec(&["/proc/self/exe"]));
    assert_eq!(exit.status, ExitStatus::Exited(42), "{lines:?}");
    let after = fs::metadata(HELPER).unwrap();
    assert_eq!((before.st_mode(), before.st_ctime_nsec()), (after.st_mode(), after.st_ctime_nsec()));
}
