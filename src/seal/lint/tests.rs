use super::*;
use crate::config::project::NetworkSettings;
use crate::definition::{Definition, File};
use crate::image::test::Tree;
use crate::provision::test::definition;
use crate::report::Report;
use crate::seal::clean::clean;
use crate::seal::lint::bake_period::file_clock;
use crate::secrets::Secrets;
use oven_distro::{Holds, Plan, Shim};
use std::ffi::OsStr;
use std::fs::{FileTimes, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, UNIX_EPOCH};

struct Bench {
    image: Definition,
    plan: Plan,
    network: NetworkSettings,
    secrets: Secrets,
    report: Report,
}

impl Bench {
    fn new() -> Self {
        let policy = Shim { path: "/usr/sbin/policy-rc.d".into(), content: "exit 101\n".into(), mode: 0o755 };
        let network = NetworkSettings {
            proxy: Some("http://proxy.local:3128".into()),
            mirror: Some("http://mirror.local/debian/".into()),
            ..NetworkSettings::default()
        };
        let caches = ["/var/lib/apt/lists", "/var/cache/apt", "/var/cache/libdnf5", "/var/cache/zypp"]
            .map(cache)
            .into();
        let plan = Plan { shims: vec![policy], caches, ..Plan::default() };
        Self {
            image: definition(Path::new("web"), |_| ()),
            plan,
            network,
            secrets: Secrets::default(),
            report: Report::silent(),
        }
    }

    fn work(&self) -> ProvisionContext<'_> {
        ProvisionContext {
            package_cache: None,
            image: &self.image,
            plan: &self.plan,
            network: &self.network,
            secrets: &self.secrets,
            guard: crate::provision::context::EgressGuard::Wanted,
            limits: crate::config::project::StepLimits::default(),
            helper: Path::new("/nowhere"),
            report: &self.report,
        }
    }

    /// Records the state of a tree, changes the tree, and returns the lint's error.
    fn lint(&self, tree: &Tree, change: impl FnOnce(&Tree)) -> Result<(), String> {
        let inside = tree.tree();
        if !tree.listing().is_empty() {
            // The files of the base have earlier times than those of the bake.
            let last = file_clock().unwrap();
            while file_clock().unwrap() <= last {}
        }
        let before = LintBaseline::of(&inside, &self.work()).unwrap();
        change(tree);
        super::lint(&inside, &self.work(), &before, &[]).map_err(|error| {
            assert_eq!(Kind::of(&error), Kind::Step);
            format!("{error:#}\n{}", crate::error::hint_of(&error).unwrap())
        })
    }
}

/// A cache of the package manager without `sources`. oven does not preserve the files of such a cache between bakes.
fn cache(path: &str) -> Cache {
    Cache { path: path.into(), holds: Holds::Indexes, sources: Vec::new() }
}

/// Files that the lint must report. Each is tested in a tree without the others.
const FORBIDDEN: &[&str] = &[
    "etc/machine-id",
    "var/lib/dbus/machine-id",
    "etc/ssh/ssh_host_ed25519_key",
    "etc/ssl/private/ssl-cert-snakeoil.key",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/dhcp/dhclient.leases",
    "var/lib/cloud/instances/i-1/sem",
    "var/log/syslog",
    "var/log/deep/er/x.log",
    "var/log/journal/1/system.journal",
    "root/.bash_history",
    "home/admin/.zsh_history",
    "root/.cache/x",
    "tmp/x",
    "var/tmp/x",
    "var/lib/apt/lists/deb.debian.org_InRelease",
    "var/cache/apt/archives/x.deb",
    "var/cache/libdnf5/own-0123456789abcdef/packages/x.rpm",
    "var/cache/zypp/packages/own/noarch/x.rpm",
    "run/oven/x",
    "usr/sbin/policy-rc.d",
];

/// Credentials that the lint must report, with their content. The clean-up does not remove them.
const CREDENTIALS: &[(&str, &str)] = &[
    ("root/.ssh/id_ed25519", "x"),
    ("root/.ssh/id_rsa", "x"),
    ("home/admin/.ssh/id_work", "x"),
    ("root/.ssh/authorized_keys", "ssh-ed25519 AAAA me"),
    ("home/admin/.ssh/authorized_keys", "ssh-ed25519 AAAA me"),
    ("var/lib/app/.ssh/id_rsa", "x"),
    ("root/.aws/credentials", "[default]"),
    ("root/.aws/config", "[default]\naws_secret_access_key = x\n"),
    ("root/.netrc", "machine x login y password z"),
    ("root/.docker/config.json", "{\"auths\": {\"x\": {\"auth\": \"eA==\"}}}"),
    ("home/admin/.config/containers/auth.json", "{}"),
    ("root/.kube/config", "apiVersion: v1"),
    ("root/.git-credentials", "https://a:b@example.com"),
    ("root/.pgpass", "*:*:*:a:b"),
    ("root/.my.cnf", "[client]\npassword=x\n"),
    ("root/.npmrc", "//registry.npmjs.org/:_authToken=x"),
    ("root/.cargo/credentials.toml", "[registry]"),
    ("root/.vault-token", "x"),
    ("root/.config/gh/hosts.yml", "github.com:\n  oauth_token: x\n"),
    ("etc/krb5.keytab", "x"),
    ("etc/wireguard/wg0.conf", "[Interface]\nPrivateKey = x\n"),
    ("etc/app/deep/site.pem", PRIVATE_KEY),
    ("home/admin/notes", PRIVATE_KEY),
    ("root/env", "AWS_ACCESS_KEY_ID=AKIAABCDEFGHIJKLMNOP\nAWS_SECRET_ACCESS_KEY=x\n"),
];

/// Files that the lint accepts.
const HARMLESS: &[(&str, &str)] = &[
    ("root/.ssh/id_ed25519.pub", "ssh-ed25519 AAAA me"),
    ("root/.ssh/known_hosts", "example.com ssh-ed25519 AAAA"),
    ("root/.ssh/authorized_keys", ""),
    ("root/.aws/config", "[default]\nregion = eu-west-1\n"),
    ("root/.docker/config.json", "{\"psFormat\": \"table\"}"),
    ("root/.my.cnf", "[client]\nuser=x\n"),
    ("root/.npmrc", "fund=false"),
    (
        "etc/ssl/certs/ca.pem",
        "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUabc\n-----END CERTIFICATE-----\n",
    ),
    ("usr/share/doc/x/key.pem", PRIVATE_KEY),
    ("home/app/node_modules/x/test/key.pem", PRIVATE_KEY),
    ("srv/app/id_rsa", PRIVATE_KEY),
];
const PRIVATE_KEY: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\n";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:9:9::/var/lib/app:/bin/sh\n";

#[test]
fn credentials_that_the_bake_added_are_found_unless_keep_names_them() {
    for (path, content) in CREDENTIALS {
        let mut bench = Bench::new();
        let tree = Tree::new();
        tree.file("etc/passwd", PASSWD);
        let found = bench.lint(&tree, |tree| tree.file(path, content)).unwrap_err();
        assert!(found.contains(&format!("/{path}: ")), "{path}: {found}");
        assert!(found.contains(&format!("[clean] keep = [\"/{path}\"]")), "{found}");
        assert_eq!(bench.lint(&tree, |_| ()), Ok(()), "{path} is in the base");
        tree.remove(path);
        let dir = path.rsplit_once('/').unwrap().0;
        for keep in [format!("/{path}"), format!("/{dir}")] {
            bench.image.keep = vec![keep];
            assert_eq!(bench.lint(&tree, |tree| tree.file(path, content)), Ok(()), "{path}");
            tree.remove(path);
        }
    }
}

#[test]
fn files_without_credentials_are_not_found() {
    for (path, content) in HARMLESS {
        let tree = Tree::new();
        assert_eq!(Bench::new().lint(&tree, |tree| tree.file(path, content)), Ok(()), "{path}");
    }
}

#[test]
fn a_credential_of_the_base_is_found_if_the_bake_changed_it() {
    let tree = Tree::new();
    tree.file("root/.ssh/authorized_keys", "ssh-ed25519 AAAA me");
    let found =
        Bench::new().lint(&tree, |tree| tree.file("root/.ssh/authorized_keys", "ssh-ed25519 BBBBB you"));
    assert!(found.unwrap_err().contains("/root/.ssh/authorized_keys: a key that could log in"));
}

/// Files of the base with private keys. Only the first one is at a known path.
const KEYS: [&str; 2] = ["root/.ssh/id_rsa", "etc/app/site.pem"];

fn base_with(path: &str) -> Tree {
    let tree = Tree::new();
    tree.file(path, PRIVATE_KEY);
    tree.file("root/.ssh/config", "");
    tree
}

#[test]
fn a_key_of_the_base_is_not_found_if_only_its_names_and_its_mode_changed() {
    type Change<'a> = &'a dyn Fn(&Tree, &str);
    let changes: [(&str, Change<'_>); 4] = [
        ("mode", &|tree, path| tree.open(path).set_permissions(Permissions::from_mode(0o640)).unwrap()),
        ("name", &|tree, path| tree.rename(path, OsStr::new("etc/renamed.pem"))),
        ("name at a known path", &|tree, path| tree.rename(path, OsStr::new("root/.ssh/id_new"))),
        ("link", &|tree, path| tree.hard_link(path, "home/me/.ssh/id_rsa")),
    ];
    for (what, change) in changes {
        for path in KEYS {
            let tree = base_with(path);
            tree.file("etc/x", "");
            assert_eq!(Bench::new().lint(&tree, |tree| change(tree, path)), Ok(()), "{what} of {path}");
        }
    }
}

#[test]
fn a_key_that_the_bake_wrote_is_found_although_its_modification_time_is_old() {
    let make_old = |tree: &Tree, path: &str| {
        let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000_000));
        tree.open(path).set_times(times).unwrap();
    };
    for path in KEYS {
        let add = |tree: &Tree| {
            tree.file(path, PRIVATE_KEY);
            make_old(tree, path);
        };
        let replace = |tree: &Tree| {
            tree.file("etc/new", PRIVATE_KEY);
            make_old(tree, "etc/new");
            tree.rename("etc/new", OsStr::new(path));
        };
        let append = |tree: &Tree| {
            let mut file = tree.open(path);
            std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
            file.write_all(b"x").unwrap();
        };
        let named = |found: Result<(), String>| found.unwrap_err().contains(&format!("/{path}: "));
        assert!(named(Bench::new().lint(&Tree::new(), add)), "{path} is new");
        let base = base_with(path);
        base.file("etc/x", "");
        assert!(named(Bench::new().lint(&base, replace)), "{path} was replaced");
        assert!(named(Bench::new().lint(&base_with(path), append)), "{path} was appended");
    }
    let overwritten = Bench::new().lint(&base_with(KEYS[0]), |tree| {
        tree.file(KEYS[0], &format!("{PRIVATE_KEY}x"));
        make_old(tree, KEYS[0]);
    });
    assert!(overwritten.is_err(), "a file at a known path was overwritten");
}

#[test]
fn keys_below_names_that_are_not_text_and_in_long_paths_are_found() {
    let found = Bench::new().lint(&Tree::new(), |tree| {
        tree.file("root/plain/x.pem", PRIVATE_KEY);
        tree.rename("root/plain", OsStr::from_bytes(b"root/\xff"));
    });
    assert!(found.unwrap_err().contains("x.pem: it contains a private key"));
    let found = Bench::new().lint(&Tree::new(), |tree| {
        tree.deep_file(&"d".repeat(200), 30, PRIVATE_KEY);
        tree.file("root/x", "");
        tree.rename(&"d".repeat(200), OsStr::new("root/deep"));
    });
    let found = found.unwrap_err();
    assert!(found.contains("/root/deep/ddd") && found.contains("ddd: it contains a private key"), "{found}");
}

#[test]
fn only_the_first_findings_are_named_and_the_rest_is_counted() {
    let mut bench = Bench::new();
    let add = |tree: &Tree| {
        (0..30).for_each(|number| tree.file(&format!("var/cache/apt/{number}"), ""));
        (0..30).for_each(|number| tree.file(&format!("root/.ssh/id_{number}"), PRIVATE_KEY));
        (0..30).for_each(|number| tree.file(&format!("tmp/{number}"), ""));
    };
    let found = bench.lint(&Tree::new(), add).unwrap_err();
    assert!(found.contains("\n    and 70 more\n"), "{found}");
    bench.image.keep = vec!["/tmp".into()];
    let found = bench.lint(&Tree::new(), add).unwrap_err();
    assert!(!found.contains("/tmp/") && found.contains("\n    and 40 more\n"), "{found}");
}

#[test]
fn names_of_files_cannot_forge_lines_of_the_error() {
    let tree = Tree::new();
    let found = Bench::new().lint(&tree, |tree| {
        tree.file("var/tmp/x\nerror: forged", "");
        tree.file("var/tmp/gpj.\u{202e}exe\u{1b}[31m", "");
    });
    let found = found.unwrap_err();
    assert!(found.contains("/var/tmp/x\\nerror: forged: a temporary file\n"), "{found}");
    assert!(found.contains("/var/tmp/gpj.\\u{202e}exe\\u{1b}[31m: a temporary file"), "{found}");
}

#[test]
fn each_thing_is_found_unless_keep_names_it() {
    for path in FORBIDDEN {
        let mut bench = Bench::new();
        let tree = Tree::new();
        let found = bench.lint(&tree, |tree| tree.file(path, "exit 101\n")).unwrap_err();
        let named = format!("/{path}");
        assert!(found.contains(&named) || found.contains("/run/oven: "), "{path}: {found}");
        assert!(found.contains("[clean] keep = [\"/"), "{found}");
        bench.image.keep = vec![if path.starts_with("run/") { "/run/oven".into() } else { named }];
        tree.remove(path);
        tree.remove("run");
        assert_eq!(bench.lint(&tree, |tree| tree.file(path, "exit 101\n")), Ok(()), "{path}");
    }
}

#[test]
fn a_cleaned_image_passes() {
    let tree = Tree::new();
    tree.file("usr/lib/systemd/systemd", "x");
    tree.file("usr/sbin/sshd", "x");
    tree.file("usr/bin/ssh-keygen", "x");
    tree.file("usr/sbin/make-ssl-cert", "x");
    let by_others = ["run/", "usr/sbin/policy", "var/cache/", "var/lib/apt/"];
    let cleaned = |path: &&&str| !by_others.iter().any(|start| path.starts_with(start));
    let bench = Bench::new();
    let result = bench.lint(&tree, |tree| {
        FORBIDDEN.iter().filter(cleaned).for_each(|path| tree.file(path, "secret"));
        clean(&tree.tree(), &[]).unwrap();
    });
    assert_eq!(result, Ok(()));
}

#[test]
fn a_symlink_where_a_directory_is_cleaned_is_found_if_it_hides_something() {
    for (at, to, found) in [
        ("var/log", "/", true),
        ("var/log", "/data", true),
        ("var/log", "/nowhere-in-the-image", false),
        ("var", "/data", true),
        ("tmp", "/data", true),
    ] {
        let bench = Bench::new();
        let tree = Tree::new();
        tree.file("data/log/x", "x");
        tree.file("data/tmp/x", "x");
        let result = bench.lint(&tree, |tree| {
            tree.link(to, at);
            clean(&tree.tree(), &[]).unwrap();
        });
        assert_eq!(result.is_err(), found, "{at} -> {to}: {result:?}");
        assert_eq!(tree.read("data/log/x").as_deref(), Some("x"));
        if let Err(text) = result {
            assert!(text.contains(&format!("/{at}: a symlink")), "{text}");
        }
    }
}

#[test]
fn files_in_the_caches_of_the_plan_are_found_whether_they_are_cached_or_not() {
    let mut bench = Bench::new();
    let sources = vec!["/etc/pkg".to_owned()];
    bench.plan.caches = vec![cache("/var/cache/zypp"), Cache { sources, ..cache("/var/lib/pkg/files") }];
    for (path, dir) in [
        ("var/cache/zypp/raw/own/repodata/repomd.xml", "/var/cache/zypp"),
        ("var/cache/zypp/pubkeys/key.asc", "/var/cache/zypp"),
        ("var/lib/pkg/files/x.pkg", "/var/lib/pkg/files"),
    ] {
        let found = bench.lint(&Tree::new(), |tree| tree.file(path, "")).unwrap_err();
        assert!(found.contains(&format!("/{path}: a file in the package manager's cache {dir}")), "{found}");
    }
    for path in ["var/cache/apt/archives/x.deb", "var/cache/zypper/x", "var/lib/pkg/index", "var/cache/x"] {
        assert_eq!(bench.lint(&Tree::new(), |tree| tree.file(path, "x")), Ok(()), "{path} is in no cache");
    }
    let empty = |tree: &Tree| {
        tree.file("var/cache/zypp/packages/own/x.rpm", "x");
        tree.remove("var/cache/zypp/packages/own/x.rpm");
    };
    assert_eq!(bench.lint(&Tree::new(), empty), Ok(()), "directories are no downloads");
    let linked = bench.lint(&Tree::new(), |tree| {
        tree.file("data/x.rpm", "x");
        tree.file("var/cache/x", "x");
        tree.link("/data", "var/cache/zypp");
    });
    assert!(linked.unwrap_err().contains("/var/cache/zypp: a symlink in place of a directory"));
}

#[test]
fn contents_of_the_base_are_not_reported() {
    let bench = Bench::new();
    let tree = Tree::new();
    tree.file("usr/sbin/policy-rc.d", "exit 101\n");
    tree.file("etc/apt/sources.list", "deb http://mirror.local/debian bookworm main\n");
    assert_eq!(bench.lint(&tree, |_| ()), Ok(()));
}

#[test]
fn settings_of_the_project_do_not_stay() {
    let mut bench = Bench::new();
    for (path, content) in [
        ("etc/apt/apt.conf.d/99proxy", "Acquire::http::Proxy \"http://proxy.local:3128/\";\n"),
        ("etc/apt/sources.list", "deb http://mirror.local/debian bookworm main\n"),
        ("etc/environment", "http_proxy=http://proxy.local:3128\n"),
    ] {
        let found = bench.lint(&Tree::new(), |tree| tree.file(path, content)).unwrap_err();
        assert!(found.contains(path), "{found}");
    }
    let file = File {
        source: "proxy".into(),
        target: "/etc/apt/apt.conf.d/99proxy".into(),
        mode: 0o644,
        owner: "root".into(),
        group: "root".into(),
        template: false,
        after_run: false,
    };
    bench.image.files = vec![file];
    let placed =
        bench.lint(&Tree::new(), |tree| tree.file("etc/apt/apt.conf.d/99proxy", "http://proxy.local:3128"));
    assert_eq!(placed, Ok(()), "what the definition places is intended");
}

#[test]
fn this_machines_name_servers_do_not_stay() {
    const BUILDERS: &str = "nameserver 10.1.2.3\nnameserver 127.0.0.53\n";
    let bench = Bench::new();
    let lint = |base: Option<&str>, change: &dyn Fn(&Tree)| {
        let tree = Tree::new();
        if let Some(base) = base {
            tree.file("etc/resolv.conf", base);
        }
        let inside = tree.tree();
        let mut before = LintBaseline::of(&inside, &bench.work()).unwrap();
        change(&tree);
        before.compare(&inside, BUILDERS).unwrap();
        super::lint(&inside, &bench.work(), &before, &[]).is_ok()
    };
    assert!(lint(Some("nameserver 9.9.9.9\n"), &|_| ()));
    assert!(!lint(Some("nameserver 9.9.9.9\n"), &|tree| tree.file("etc/resolv.conf", BUILDERS)));
    assert!(!lint(None, &|tree| tree.file("etc/resolv.conf", "search x\nnameserver  10.1.2.3\n")));
    assert!(lint(Some(BUILDERS), &|_| ()), "the base has the same");
    assert!(lint(Some("x\n"), &|tree| tree.file("etc/resolv.conf", "nameserver 127.0.0.53\n")));
    assert!(lint(Some("x\n"), &|tree| {
        tree.remove("etc/resolv.conf");
        tree.link("/run/systemd/resolve/stub-resolv.conf", "etc/resolv.conf");
    }));
}
