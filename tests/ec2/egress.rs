//! The builder's role is out of a step's reach, through whole bakes on a builder that has one: in a network namespace
//! whose metadata service, with the role's keys, has the addresses that it has on EC2. What the fence is made of,
//! tests/root/steps/egress.rs tries.

use oven::sys::namespaces;
use oven_ec2_server::ServerOptions;
use oven_testing::ec2_world::{Ended, HANGS, HERE};
use oven_testing::local_world::tiny_base;
use oven_testing::programs::copy_program;
use oven_testing::{Ec2World, full, ring};
use rustix::thread::UnshareFlags;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

const PORT: u16 = 80;
/// Of an instance by both families, and of a container.
const ADDRESSES: [&str; 3] = ["169.254.169.254", "169.254.170.2", "fd00:ec2::254"];
/// The key id that the server's role has.
const KEY: &str = "ASIAOVENTESTSERVER01";
/// Of oven's own environment.
const PLANTED: &str = "AKIAPLANTED0EXAMPLE0";

/// What a script does that is after the role: looks into its environment, tries every way to each address, and plays
/// IMDSv2's part by hand.
const SPY: &str = r#"
B=$(command -v busybox || echo /usr/local/bin/busybox)
$B env
/usr/local/bin/probe 80 169.254.169.254 169.254.170.2 fd00:ec2::254
at=/latest/meta-data/iam/security-credentials/oven-builder
for ip in 169.254.169.254 169.254.170.2 fd00:ec2::254; do
    ask() { $B printf "$1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n$2\r\n\r\n" | $B timeout 3 $B nc $ip 80; }
    token=$(ask "PUT /latest/api/token" "Content-Length: 0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60" | $B tail -n 1)
    echo "keys by $ip: $(ask "GET $at" "X-aws-ec2-metadata-token: $token" | $B tail -n 1)"
done
echo "at the end"
"#;

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().expect("these tests need iproute2");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A builder in a network of its own, where the metadata service is at its addresses.
struct Builder {
    world: Ec2World,
    /// Datagrams that came.
    datagrams: Arc<AtomicUsize>,
}

impl Builder {
    /// `proxy`: takes the listener of an HTTP proxy inside.
    fn new(raw: &Path, proxy: Option<Sender<TcpListener>>) -> Self {
        ip("link set lo up");
        for address in ADDRESSES {
            let (length, nodad) = if address.contains(':') { (128, " nodad") } else { (32, "") };
            ip(&format!("addr add {address}/{length} dev lo{nodad}"));
        }
        // Of both families.
        let listen = (Ipv6Addr::UNSPECIFIED, PORT);
        let world = Ec2World::on(raw, ServerOptions { listen: listen.into(), ..ServerOptions::default() });
        let (datagrams, count) = (Arc::new(AtomicUsize::new(0)), UdpSocket::bind(listen).unwrap());
        let counted = datagrams.clone();
        // It ends with the process.
        std::thread::spawn(move || {
            while let Ok((_, from)) = count.recv_from(&mut [0; 8]) {
                counted.fetch_add(1, Ordering::Relaxed);
                _ = count.send_to(b"secret", from);
            }
        });
        if let Some(proxy) = proxy {
            let inside = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let at = inside.local_addr().unwrap();
            world.local.write("oven.toml", &format!("[network]\nproxy = \"http://{at}\"\n"));
            proxy.send(inside).unwrap();
        }
        let cc = Command::new("cc")
            .args(["-static", "-O1", "-o"])
            .arg(world.local.path("probe"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/root/steps/probe.c"))
            .status();
        assert!(cc.expect("these tests need a C compiler").success());
        Self { world, datagrams }
    }

    fn copy(&self, from: impl AsRef<Path>, to: &str) {
        let to = self.world.local.path(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        copy_program(from.as_ref(), &to);
    }

    /// A bake that finds its metadata service where every instance does. What it printed, with all output of its steps.
    fn bake(&self, change: impl FnOnce(&mut Command)) -> (Ended, String) {
        let mut command = self.world.bake_on(HERE);
        command.env_remove("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        command.env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{PORT}"));
        change(&mut command);
        let ended = self.world.start(command).end(HANGS, "a spy");
        let logs = std::fs::read_dir(self.world.local.path(HERE).join("logs")).unwrap();
        let newest = logs.flatten().max_by_key(|log| log.metadata().unwrap().modified().unwrap());
        let log = std::fs::read_to_string(newest.expect(&ended.err).path()).unwrap();
        assert_eq!(ended.code(), Some(0), "{}\n{log}", ended.err);
        (ended, log)
    }
}

/// Runs in a thread with a network of its own.
fn elsewhere<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let _ring = ring::shared();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespaces::unshare(UnshareFlags::NEWNET).unwrap();
            test()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The part of a log that a script wrote, by what it says first and last.
fn part<'a>(log: &'a str, name: &str) -> &'a str {
    let (_, rest) =
        log.split_once(&format!("this is {name}")).unwrap_or_else(|| panic!("no {name} in {log}"));
    rest.split_once("at the end").unwrap_or_else(|| panic!("{name} did not end: {rest}")).0
}

/// Nothing of the role or of oven's environment.
fn assert_blind(log: &str, name: &str) {
    let told = part(log, name);
    assert!(told.contains("PATH="), "{name} has no environment: {told}");
    assert!(told.matches("keys by ").count() == 3 && told.matches("tcp ").count() == 5, "{told}");
    let seen: Vec<&str> =
        told.lines().filter(|line| line.ends_with(" reached") || line.contains(KEY)).collect();
    assert!(seen.is_empty(), "{name}: {seen:#?}");
}

const FILES: &str = "[[file]]\nsource = \"probe\"\ntarget = \"/usr/local/bin/probe\"\nmode = \"0755\"\n";

#[test]
fn no_script_of_a_bake_reads_the_role() {
    elsewhere(|| {
        let builder = Builder::new(&tiny_base(), None);
        builder.copy(builder.world.local.path("probe"), "image/probe");
        let script = |name: &str| {
            builder
                .world
                .local
                .write(&format!("image/{name}.sh"), &format!("#!/bin/sh\necho this is {name}\n{SPY}"));
        };
        ["open-run", "closed-run", "open-test", "closed-test"].into_iter().for_each(script);
        let more = format!(
            "{FILES}[[run]]\nscript = \"open-run.sh\"\nnetwork = true\n[[run]]\nscript = \"closed-run.sh\"\n\
             [[test]]\nscript = \"open-test.sh\"\nnetwork = true\n[[test]]\nscript = \"closed-test.sh\"\n"
        );
        builder.world.define(&builder.world.base(), &more);
        // By the role alone, at the addresses that it has on every instance.
        let (_, log) = builder.bake(|_| ());
        for name in ["open-run", "closed-run", "open-test", "closed-test"] {
            assert_blind(&log, name);
        }
        let asked = |path: &str| {
            builder.world.server.calls().iter().filter(|call| call.action.contains(path)).count()
        };
        assert_eq!(asked("security-credentials/oven-builder"), 1, "oven's own");
        assert_eq!(builder.datagrams.load(Ordering::Relaxed), 0);

        // With `imds = true` the same scripts get there, where they have the network: so the other ones did not miss
        // for another reason. And what oven's own environment holds reaches none of them.
        builder.world.define(&builder.world.base(), &format!("imds = true\n{more}"));
        let (_, log) = builder.bake(|command| {
            let planted = [
                ("AWS_ACCESS_KEY_ID", PLANTED),
                ("AWS_SECRET_ACCESS_KEY", "planted"),
                ("AWS_SESSION_TOKEN", "planted"),
            ];
            command
                .envs(planted)
                .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "planted")
                .env("OVEN_REGION", "us-east-1");
        });
        for name in ["open-run", "open-test"] {
            let told = part(&log, name);
            let keys: Vec<&str> = told.lines().filter(|line| line.contains("keys by ")).collect();
            assert!(keys.len() == 3 && keys.iter().all(|line| line.contains(KEY)), "{keys:#?}");
        }
        assert_blind(&log, "closed-run");
        assert_blind(&log, "closed-test");
        assert!(builder.datagrams.load(Ordering::Relaxed) > 0);
        // The steps of the distro print theirs, too.
        assert!(log.matches("PATH=").count() >= 6, "{log}");
        for word in [PLANTED, "planted", "AWS_", "OVEN_REGION", "OVEN_TEST"] {
            assert!(!log.contains(word), "{word} in {log}");
        }
    });
}

/// An HTTP proxy that stands outside: for a step inside the only way out.
fn proxy() -> Sender<TcpListener> {
    let (sender, inside) = channel::<TcpListener>();
    std::thread::spawn(move || {
        let Ok(listener) = inside.recv() else { return };
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || _ = forward(client));
        }
    });
    sender
}

/// A connection on which all requests (`GET http://host/path`) are for the first one's host: servers take them as they are.
fn forward(client: TcpStream) -> std::io::Result<()> {
    let mut requests = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    requests.read_line(&mut first)?;
    let host = first.split(' ').nth(1).and_then(|url| url.strip_prefix("http://")?.split('/').next());
    let Some(host) = host else { return Ok(()) };
    let server = TcpStream::connect(if host.contains(':') { host.to_owned() } else { format!("{host}:80") })?;
    let mut answers = server.try_clone()?;
    std::thread::spawn(move || {
        _ = std::io::copy(&mut answers, &mut &client);
        _ = client.shutdown(std::net::Shutdown::Both);
    });
    (&server).write_all(first.as_bytes())?;
    std::io::copy(&mut requests, &mut &server)?;
    server.shutdown(std::net::Shutdown::Both)
}

#[test]
fn no_package_of_a_bake_reads_the_role() {
    let base = std::env::var("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test ec2");
    let outside = proxy();
    elsewhere(|| {
        let builder = Builder::new(Path::new(&base), Some(outside));
        // The package brings its tools; its script, run as root, uses them.
        for tool in ["probe", "busybox"] {
            let from =
                if tool == "probe" { builder.world.local.path("probe") } else { "/bin/busybox".into() };
            builder.copy(from, &format!("spy/usr/local/bin/{tool}"));
        }
        let control =
            "Package: spy\nVersion: 1\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: s\n";
        builder.world.local.write("spy/DEBIAN/control", control);
        builder.world.local.write("spy/DEBIAN/postinst", &format!("#!/bin/sh\necho this is postinst\n{SPY}"));
        for program in ["DEBIAN/postinst", "usr/local/bin/probe", "usr/local/bin/busybox"] {
            let path = builder.world.local.path("spy").join(program);
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(path, mode).unwrap();
        }
        let mut build = Command::new("dpkg-deb");
        build.args(["--root-owner-group", "-Znone", "-b"]).arg(builder.world.local.path("spy"));
        let built = build.arg(builder.world.local.path("image/spy.deb")).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        for network in if full() { vec![false, true] } else { vec![true] } {
            let more = format!("network = {network}\npackages = [\"./spy.deb\"]\n");
            builder.world.define(&builder.world.base(), &more);
            let (_, log) = builder.bake(|_| ());
            assert_blind(&log, "postinst");
            let told = part(&log, "postinst");
            assert!(!told.contains("AWS_") && !told.contains("OVEN_TEST"), "{told}");
            // Kept out, and not merely without a network.
            assert_eq!(told.contains(" tcp 169.254.169.254 EPERM"), network, "{told}");
        }
        assert_eq!(builder.datagrams.load(Ordering::Relaxed), 0);
    });
}
