//! Bakes of a small Debian with the real apt, and with packages that misbehave. Needs root, mmdebstrap, dpkg-deb and a
//! mirror of Debian.

use oven_testing::PackageLab;
use oven_testing::packages::LabBake;
use oven_testing::packages::package_lab::RESOLV_CONF;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

const STEP: u8 = 5;
const DEFINITION: u8 = 3;

/// A maintainer script.
fn postinst(text: &str) -> [(&'static str, String); 1] {
    [("DEBIAN/postinst", format!("#!/bin/sh\nset -e\n{text}\n"))]
}

/// Bakes a definition of one local package whose postinst does this.
fn with_postinst(text: &str) -> (PackageLab, LabBake) {
    let lab = PackageLab::new();
    let text = text.replace("@HOST@", &lab.path("host").display().to_string());
    let [(path, script)] = postinst(&text);
    lab.package("hostile", "1.0", "", &[(path, &script), ("usr/share/hostile/file", "x\n")]);
    lab.define("packages = [\"./hostile.deb\"]\n");
    let baked = lab.bake();
    (lab, baked)
}

/// dpkg-query prints warnings on standard error and succeeds. The linker warns in each program.
#[test]
fn warnings_of_dpkg_are_not_packages() {
    let lab = PackageLab::new();
    lab.package("nomaint", "1.0", "", &[("usr/share/nomaint/x", "x\n")]);
    // The status of a package without a maintainer, as other tools build it.
    let status = lab.read("var/lib/dpkg/status");
    let old = "\nPackage: base-nomaint\nStatus: install ok installed\nVersion: 2.0\nArchitecture: all\n\
               Description: x\n";
    fs::write(lab.image("var/lib/dpkg/status"), format!("{}{old}", status.trim_end().to_owned() + "\n"))
        .unwrap();
    fs::write(lab.image("var/lib/dpkg/info/base-nomaint.list"), "/.\n").unwrap();
    fs::write(lab.image("etc/ld.so.preload"), "/usr/lib/gone.so\n").unwrap();
    // Without its file list, dpkg assumes that a package has no files, and warns.
    fs::remove_file(lab.image("var/lib/dpkg/info/mawk.list")).unwrap();
    lab.define("packages = [\"./nomaint.deb\"]\n");
    let baked = lab.bake();
    let log = baked.log.clone();
    assert!(log.contains("cannot be preloaded"), "{log}");
    let facts = baked.facts();
    let packages = &facts["packages"];
    for line in ["nomaint\t1.0\tall\n", "base-nomaint\t2.0\tall\n", "mawk\t"] {
        assert!(packages.contains(line), "{line}: {packages}");
    }
    for word in ["warning", "ld.so", "preload", "Maintainer"] {
        assert!(!packages.contains(word), "{word}: {packages}");
    }
}

#[test]
fn real_packages_from_the_mirror_and_a_local_one_with_dependencies() {
    let lab = PackageLab::new();
    lab.package("site", "1.0", "Depends: tree\n", &[("usr/share/site/index.html", "hello\n")]);
    lab.define("packages = [\"jq=1.*\", \"./site.deb\"]\n");
    // Hooks and settings of the image's own must not win.
    fs::write(
        lab.image("etc/apt/apt.conf.d/99own"),
        "DPkg::Post-Invoke { \"echo HOOK; rm -f /var/cache/apt/archives/*.deb\"; };\n\
         APT::Update::Post-Invoke { \"echo HOOK\"; };\nAPT::Install-Recommends \"true\";\nAcquire::Languages { \"de\"; };\n",
    )
    .unwrap();
    let baked = lab.bake();
    assert!(!baked.log.contains("HOOK"), "{}", baked.log);
    assert!(baked.log.contains("packages: 5 installed"), "{}", baked.log);
    let facts = baked.facts();
    let packages = &facts["packages"];
    for line in ["site\t1.0\tall\n", "\ntree\t", "\njq\t1."] {
        assert!(packages.contains(line), "{packages}");
    }
    assert_eq!(lab.read("etc/resolv.conf"), RESOLV_CONF);
    assert_eq!(lab.read("usr/share/site/index.html"), "hello\n");
    for log in ["dpkg.log", "apt/term.log", "apt/history.log"] {
        assert_eq!(lab.read(&format!("var/log/{log}")), "", "{log}");
    }
    for dir in ["var/lib/apt/lists", "var/cache/apt/archives", "var/lib/apt/lists/partial", "tmp"] {
        let files = fs::read_dir(lab.image(dir)).unwrap().flatten();
        let files: Vec<_> = files.filter(|e| e.file_type().unwrap().is_file()).collect();
        assert!(files.is_empty(), "{dir}: {files:?}");
    }
    let audit =
        std::process::Command::new("dpkg").arg("--audit").arg("--root").arg(lab.image("")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&audit.stdout), "");
}

#[test]
fn an_upgrade_and_a_mirror() {
    let mut lab = PackageLab::new();
    // The image's own archive is not to be reached; the mirror is Debian's own.
    fs::write(lab.image("etc/apt/sources.list"), "deb http://127.0.0.1:9/debian bookworm main\n").unwrap();
    fs::write(
        lab.image("etc/apt/sources.list.d/debian.sources"),
        "Types: deb\nURIs: http://127.0.0.1:9/\nSuites: x\nComponents: main\n",
    )
    .unwrap();
    let sources = ["etc/apt/sources.list", "etc/apt/sources.list.d/debian.sources"];
    let before = sources.map(|path| lab.read(path));
    lab.network.mirror = Some("http://deb.debian.org/debian".into());
    lab.define("packages = [\"tree\"]\nupgrade = true\n");
    let baked = lab.bake();
    assert!(baked.facts()["packages"].contains("\ntree\t"));
    assert_eq!(sources.map(|path| lab.read(path)), before);
}

/// The small image trusts nobody: it has no ca-certificates.
#[test]
fn certificates_of_the_settings_are_trusted_and_do_not_stay() {
    let mut lab = PackageLab::new();
    lab.network.mirror = Some("https://deb.debian.org/debian".into());
    lab.define("packages = [\"tree\"]\n");
    let once = |plan: &mut oven_distro::Plan| plan.steps.iter_mut().for_each(|step| step.retries = 0);
    let (code, text) = lab.bake_with(once).failure();
    assert_eq!(code, STEP);
    assert!(text.to_lowercase().contains("certificate"), "{text}");
    lab.network.ca_file = Some("/etc/ssl/certs/ca-certificates.crt".into());
    assert!(lab.bake_with(once).facts()["packages"].contains("\ntree\t"));
    assert!(!lab.image("etc/ssl/certs/ca-certificates.crt").exists());
}

#[test]
fn an_index_that_cannot_be_fetched_is_an_error_and_is_tried_again() {
    let lab = PackageLab::new();
    let more = "deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n";
    fs::write(lab.image("etc/apt/sources.list.d/more.list"), more).unwrap();
    lab.define("packages = [\"tree\"]\n");
    let baked =
        lab.bake_with(|plan| plan.steps.iter_mut().for_each(|step| step.retries = step.retries.min(1)));
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    assert!(text.contains("refreshing the package index") && text.contains("127.0.0.1"), "{text}");
    assert!(baked.log.contains("retrying in 2 s"), "{}", baked.log);
}

#[test]
fn an_unknown_package_is_the_definitions_mistake() {
    let lab = PackageLab::new();
    lab.define("packages = [\n  \"tree\",\n  \"nginx-lihgt\",\n]\n");
    let started = Instant::now();
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("web/image.toml:5: `packages`") && text.contains("`nginx-lihgt`"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(60), "it is not tried again");
}

#[test]
fn a_version_that_is_not_there_is_the_definitions_mistake() {
    let lab = PackageLab::new();
    lab.define("packages = [\"jq=99.*\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("image.toml:3: `packages`") && text.contains("version `99.*` of `jq`"), "{text}");
}

#[test]
fn a_virtual_package_is_explained() {
    let lab = PackageLab::new();
    lab.define("packages = [\"mail-transport-agent\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("`mail-transport-agent`") && text.contains("exim4-daemon-light"), "{text}");
}

#[test]
fn packages_that_cannot_be_together_are_explained() {
    let lab = PackageLab::new();
    lab.package("one", "1.0", "Conflicts: tree\n", &[]);
    lab.define("packages = [\"tree\", \"./one.deb\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("cannot be installed together") && text.contains("Conflicts: tree"), "{text}");
}

#[test]
fn a_daemon_is_killed_and_named() {
    let (lab, baked) = with_postinst("setsid sleep 1234 >/dev/null 2>&1 &");
    assert!(baked.log.contains("warning") && baked.log.contains("sleep"), "{}", baked.log);
    assert!(baked.facts()["packages"].contains("hostile\t1.0\tall\n"));
    drop(lab);
}

#[test]
fn services_are_not_started() {
    let (lab, baked) = with_postinst(
        "/usr/sbin/policy-rc.d nginx start || code=$?\ntest \"$code\" = 101\necho asked > /asked",
    );
    baked.facts();
    assert_eq!(lab.read("asked"), "asked\n");
}

#[test]
fn a_question_gets_no_answer_and_no_terminal() {
    let (lab, baked) = with_postinst(
        "if read answer; then exit 9; fi\nif (: < /dev/tty) 2>/dev/null; then exit 8; fi\necho $DEBIAN_FRONTEND > /frontend",
    );
    baked.facts();
    assert_eq!(lab.read("frontend"), "noninteractive\n");
}

#[test]
fn a_script_that_fails_is_named_with_its_last_words() {
    let (_ground, baked) = with_postinst("echo these are my last words\nexit 7");
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    for words in ["installing 1 package", "`hostile`", "exit status 100", "these are my last words"] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn a_script_that_hangs_is_killed() {
    let lab = PackageLab::new();
    let [(path, script)] = postinst("trap '' TERM\nwhile :; do sleep 100; done");
    lab.package("hostile", "1.0", "", &[(path, &script)]);
    lab.define("packages = [\"./hostile.deb\"]\n");
    let baked =
        lab.bake_with(|plan| plan.steps.iter_mut().filter(|s| !s.network).for_each(|s| s.timeout = 5));
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    assert!(text.contains("longer than 5 s"), "{text}");
}

#[test]
fn a_script_that_needs_the_network_gets_a_hint() {
    let (_ground, baked) = with_postinst(
        "perl -MSocket -e 'gethostbyname(\"deb.debian.org\") or die \"Could not resolve host\\n\"'",
    );
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    assert!(text.contains("`network = true`"), "{text}");
}

#[test]
fn planted_links_lead_nowhere() {
    let (lab, baked) = with_postinst(
        "rm -f /etc/resolv.conf\nln -s @HOST@/canary /etc/resolv.conf\nmv /var/log /var/log.old\nln -s @HOST@ /var/log\nln -sf @HOST@/canary /etc/machine-id\nln -s @HOST@/canary /root/.bash_history",
    );
    assert!(baked.result.is_ok(), "{}", baked.log);
    assert_eq!(fs::read_link(lab.image("var/log")).unwrap(), lab.path("host"));
    assert_eq!(lab.read("etc/machine-id"), "");
    assert!(lab.image("root/.bash_history").symlink_metadata().is_err());
}

#[test]
fn logs_that_are_hidden_behind_a_link_fail_the_lint() {
    let (_ground, baked) = with_postinst("mkdir /data\nmv /var/log /data/log\nln -s /data/log /var/log");
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    assert!(text.contains("/var/log: a symlink") && text.contains("[clean] keep = [\"/var/log\"]"), "{text}");
}

#[test]
fn a_full_disk_is_reported() {
    let lab = PackageLab::on("size=160m");
    let [(path, script)] = postinst("dd if=/dev/zero of=/big bs=1M 2>&1");
    lab.package("hostile", "1.0", "", &[(path, &script)]);
    lab.define("packages = [\"./hostile.deb\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("disk is full") && text.contains("size_gib"), "{text}");
}

#[test]
fn a_package_that_hides_a_full_disk_fails_too() {
    let lab = PackageLab::on("size=160m");
    lab.script("fill.sh", "dd if=/dev/zero of=/big bs=1M 2>/dev/null || true");
    lab.define("[[run]]\nscript = \"fill.sh\"\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("no space is left"), "{text}");
}

/// The base holds version 1 with a changed configuration file; version 2 changes it, too.
fn conffile(policy: &str) -> String {
    let lab = PackageLab::new();
    let package = |version: &str, content: &str| {
        let files = [("etc/thing.conf", content), ("DEBIAN/conffiles", "/etc/thing.conf\n")];
        lab.package("thing", version, "", &files);
    };
    package("1.0", "one\n");
    lab.define("packages = [\"./thing.deb\"]\n");
    lab.bake().facts();
    fs::write(lab.image("etc/thing.conf"), "mine\n").unwrap();
    package("2.0", "two\n");
    lab.define(&format!("packages = [\"./thing.deb\"]\n{policy}"));
    assert!(lab.bake().facts()["packages"].contains("thing\t2.0\tall"));
    lab.read("etc/thing.conf")
}

#[test]
fn a_changed_configuration_file_stays_or_is_replaced() {
    assert_eq!(conffile(""), "mine\n");
    assert_eq!(conffile("conffiles = \"replace\"\n"), "two\n");
}

/// A lock of dpkg or apt belongs to a process. A file that the base has of it locks nothing.
#[test]
fn lock_files_of_the_base_do_not_stop_an_installation() {
    let lab = PackageLab::new();
    for dir in ["var/lib/dpkg", "var/lib/apt/lists", "var/cache/apt/archives"] {
        fs::create_dir_all(lab.image(dir)).unwrap();
        for lock in ["lock", "lock-frontend"] {
            fs::write(lab.image(dir).join(lock), "4711\n").unwrap();
        }
    }
    lab.package("site", "1.0", "", &[("usr/share/site/file", "x\n")]);
    lab.define("packages = [\"./site.deb\"]\n");
    lab.bake().facts();
    assert_eq!(lab.read("usr/share/site/file"), "x\n");
}

#[test]
fn a_half_configured_base_is_refused() {
    let (lab, baked) = with_postinst("exit 1");
    baked.failure();
    lab.define("packages = [\"tree\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("base image") && text.contains("`hostile` is half-configured"), "{text}");
}

#[test]
fn files_runs_and_tests() {
    let lab = PackageLab::new();
    fs::write(lab.path("web/motd"), "hello\n").unwrap();
    fs::create_dir(lab.path("common")).unwrap();
    fs::write(lab.path("common/words"), "shared\n").unwrap();
    lab.script("setup.sh", "test \"$PWD\" = /run/oven/definition\ncp ../common/words /words\ncat /etc/motd >> /words\necho $OVEN_NAME $OVEN_PHASE >> /words\n! touch here 2>/dev/null\n! test -e /run/oven/apt.conf.d");
    lab.script("look.sh", "grep shared /words\necho $OVEN_PHASE > /phase\nsleep 1000 &");
    lab.define(
        "inputs = [\"../common\"]\n[[file]]\nsource = \"motd\"\ntarget = \"/etc/motd\"\nmode = \"0640\"\nowner = \"games\"\ngroup = \"mail\"\n[[run]]\nscript = \"setup.sh\"\n[[test]]\nscript = \"look.sh\"\n",
    );
    let baked = lab.bake();
    assert!(!baked.log.contains("warning"), "a test may start what it tests: {}", baked.log);
    baked.facts();
    assert_eq!(lab.read("words"), "shared\nhello\nweb run\n");
    assert!(!lab.image("phase").exists(), "a test changes nothing");
    let motd = lab.image("etc/motd").metadata().unwrap();
    assert_eq!(motd.permissions().mode() & 0o7777, 0o640);
    assert_eq!(
        (std::os::linux::fs::MetadataExt::st_uid(&motd), std::os::linux::fs::MetadataExt::st_gid(&motd)),
        (5, 8)
    );
}

/// It runs while the test runs; what the test prints about it is in the log.
#[test]
fn a_test_starts_the_service_that_it_needs() {
    let lab = PackageLab::new();
    lab.script(
        "serve.sh",
        "cd /tmp\nmkfifo ask answer\nsh -c 'read word < ask; echo \"served $word\" > answer; exec sleep 1000' &\n\
         echo tree > ask\nread words < answer\necho \"it $words\"\ntest \"$words\" = \"served tree\"",
    );
    lab.define("[[test]]\nscript = \"serve.sh\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("it served tree"), "{}", baked.log);
    assert!(!baked.log.contains("warning"), "{}", baked.log);
    baked.facts();
    assert!(!lab.image("tmp/ask").exists(), "a test changes nothing");
}

#[test]
fn a_test_that_fails_and_a_run_without_network() {
    let lab = PackageLab::new();
    lab.script("bad.sh", "echo it is broken >&2\nexit 3");
    lab.define("[[test]]\nscript = \"bad.sh\"\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("image.toml:3: the [[test]] bad.sh failed: bad.sh: exit status 3"), "{text}");
    assert!(text.contains("it is broken") && text.contains("oven makes no image"), "{text}");

    lab.script(
        "fetch.sh",
        "perl -MSocket -e 'gethostbyname(\"deb.debian.org\") or die \"Could not resolve host\\n\"'",
    );
    lab.define("[[run]]\nscript = \"fetch.sh\"\n");
    let (_, text) = lab.bake().failure();
    assert!(text.contains("`network = true` in its [[run]]"), "{text}");
    lab.define("[[run]]\nscript = \"fetch.sh\"\nnetwork = true\n");
    lab.bake().facts();
    assert_eq!(lab.read("etc/resolv.conf"), RESOLV_CONF);
}

#[test]
fn settings_of_the_network_reach_fetch_steps_alone() {
    let mut lab = PackageLab::new();
    // No proxy listens there: that it is asked is seen by the failure.
    lab.network.proxy = Some("http://127.0.0.1:9".into());
    lab.define("packages = [\"tree\"]\n");
    let baked = lab.bake_with(|plan| plan.steps.iter_mut().for_each(|step| step.retries = 0));
    let (_, text) = baked.failure();
    assert!(text.contains("127.0.0.1:9") || text.contains("127.0.0.1 9"), "{text}");
    lab.script("env.sh", "! env | grep -i proxy");
    lab.define("[[run]]\nscript = \"env.sh\"\n");
    lab.bake().facts();
    lab.define("[[run]]\nscript = \"env.sh\"\nnetwork = true\n");
    lab.bake().facts();
}

/// The image gets systemd's program, so that oven can add units.
fn with_systemd(lab: &PackageLab) {
    fs::create_dir_all(lab.image("usr/lib/systemd")).unwrap();
    fs::write(lab.image("usr/lib/systemd/systemd"), "elf").unwrap();
}

#[test]
fn identities_that_real_packages_make_are_not_cloned() {
    let lab = PackageLab::new();
    with_systemd(&lab);
    lab.define("packages = [\"nvme-cli\", \"open-iscsi\", \"bind9\", \"popularity-contest\"]\n");
    let baked = lab.bake();
    let log = baked.log.clone();
    baked.facts();
    for path in ["etc/nvme/hostnqn", "etc/nvme/hostid", "etc/iscsi/initiatorname.iscsi", "etc/bind/rndc.key"]
    {
        assert!(!lab.image(path).exists(), "{path}\n{log}");
    }
    let popcon = lab.read("etc/popularity-contest.conf");
    assert!(popcon.contains("\nMY_HOSTID=\"\"\n") && popcon.contains("PARTICIPATE="), "{popcon}");
    for unit in ["oven-nvme-host-id", "oven-iscsi-initiator", "oven-rndc-key", "oven-popularity-contest-id"] {
        let link = lab.image(&format!("etc/systemd/system/basic.target.wants/{unit}.service"));
        assert!(link.symlink_metadata().is_ok() && log.contains(unit), "{unit}\n{log}");
    }
    // Each file gets its owner and its mode.
    let unit = lab.read("etc/systemd/system/oven-rndc-key.service");
    assert!(unit.contains("chmod 0640 /etc/bind/rndc.key") && !unit.contains("chown 0:0 "), "{unit}");
    // These packages make no other secrets, and oven does not call their usual files secrets.
    assert!(!log.contains("look like keys"), "{log}");
}

/// Several machines may share such a secret on purpose.
#[test]
fn identities_that_may_be_shared_are_removed_only_if_a_package_made_them() {
    const COOKIE: &str = "var/lib/rabbitmq/.erlang.cookie";
    const MAKE: &str =
        "mkdir -p /var/lib/rabbitmq\necho ABCDEFGHIJKLMNOPQRST > /var/lib/rabbitmq/.erlang.cookie";
    const UNIT: &str = "etc/systemd/system/oven-rabbitmq-cookie.service";
    let bake = |made_by: &str, toml: &str| {
        let lab = PackageLab::new();
        with_systemd(&lab);
        let [(path, script)] = postinst(if made_by == "package" { MAKE } else { "true" });
        let content = if made_by == "content" { COOKIE } else { "usr/share/app/x" };
        lab.package("app", "1.0", "", &[(path, &script), (content, "the shared one\n")]);
        if made_by == "base" {
            fs::create_dir_all(lab.image("var/lib/rabbitmq")).unwrap();
            fs::write(lab.image(COOKIE), "the shared one\n").unwrap();
        }
        lab.script(
            "own.sh",
            "mkdir -p /var/lib/rabbitmq\necho the shared one > /var/lib/rabbitmq/.erlang.cookie",
        );
        let run = if made_by == "run" { "[[run]]\nscript = \"own.sh\"\n" } else { "" };
        lab.define(&format!("packages = [\"./app.deb\"]\n{run}{toml}"));
        let baked = lab.bake();
        let log = baked.log.clone();
        baked.facts();
        (lab, log)
    };
    let remove = "[clean]\nremove = [\"/var/lib/rabbitmq/.erlang.cookie\"]\n";
    let keep = "[clean]\nkeep = [\"/var/lib/rabbitmq\"]\n";
    for (made_by, toml, remains, warns) in [
        ("package", "", false, false),
        ("package", keep, true, false),
        ("content", "", true, false),
        ("run", "", true, false),
        ("base", "", true, true),
        ("base", keep, true, false),
        ("base", remove, false, false),
    ] {
        let (lab, log) = bake(made_by, toml);
        assert_eq!(lab.image(COOKIE).exists(), remains, "{made_by} {toml}: {log}");
        assert_eq!(lab.image(UNIT).exists(), !remains, "{made_by} {toml}: {log}");
        assert_eq!(log.contains("trust each other, from the base image)"), warns, "{made_by} {toml}: {log}");
        assert!(
            !log.contains("matches nothing") && (warns || !log.contains("look like keys")),
            "{made_by}: {log}"
        );
    }
}

/// The list of the packages' files is only for a warning, so its failure must not fail the bake.
#[test]
fn other_secrets_are_reported_if_the_package_manager_crashes() {
    const POSTINST: &str = "mkdir -p /etc/app\nhead -c 32 /dev/urandom > /etc/app/site.key\n\
        echo secret > /etc/app/own.key\nmv /usr/bin/dpkg-query /usr/bin/dpkg-query.real\n\
        printf '#!/bin/sh\\ncase \"$1\" in -S) kill -9 $$;; esac\\nexec /usr/bin/dpkg-query.real \"$@\"\\n' \
        > /usr/bin/dpkg-query\nchmod 755 /usr/bin/dpkg-query";
    let lab = PackageLab::new();
    let [(path, script)] = postinst(POSTINST);
    lab.package("app", "1.0", "", &[(path, &script), ("etc/app/own.key", "x\n")]);
    lab.define("packages = [\"./app.deb\"]\n");
    let baked = lab.bake();
    let log = baked.log.clone();
    baked.facts();
    assert!(log.contains("/etc/app/site.key (") && log.contains("/etc/app/own.key ("), "{log}");
}

#[test]
fn other_secrets_of_packages_scripts_are_reported_kept_or_removed() {
    const POSTINST: &str = "mkdir -p /etc/app /var/lib/app /opt/app\n\
        head -c 32 /dev/urandom > /etc/app/site.key\n\
        printf \"dbc_dbpass='wU3kx0AbqPzS'\\n\" > /etc/app/db.conf\n\
        echo 0b7dd1a4-6d5c-4d5a-9a0e-3f0a3a1d2c11 > /var/lib/app/node\n\
        echo token > /opt/app/token\n\
        echo 'password = AbCdEfGh12' >> /etc/app/own.conf\n\
        echo usual > /etc/app/usual.conf";
    let bake = |toml: &str| {
        let lab = PackageLab::new();
        let [(path, script)] = postinst(POSTINST);
        let conffiles = ("DEBIAN/conffiles", "/etc/app/own.conf\n");
        lab.package("app", "1.0", "", &[(path, &script), conffiles, ("etc/app/own.conf", "# own\n")]);
        lab.script("own.sh", "echo key > /etc/app/mine.key");
        lab.define(&format!("packages = [\"./app.deb\"]\n[[run]]\nscript = \"own.sh\"\n{toml}"));
        let baked = lab.bake();
        let log = baked.log.clone();
        baked.facts();
        (lab, log)
    };
    let (_lab, log) = bake("");
    for path in ["/etc/app/site.key (", "/etc/app/db.conf (", "/var/lib/app/node (", "/opt/app/token ("] {
        assert!(log.contains(path), "{path}: {log}");
    }
    // A package owns the first file, the second one is not suspicious, and the definition made the third one.
    for path in ["own.conf (", "usual.conf (", "mine.key ("] {
        assert!(!log.contains(path), "{path}: {log}");
    }
    assert!(log.contains("[clean] remove") && !log.contains("wU3kx0AbqPzS"), "{log}");
    let (lab, log) = bake(
        "[clean]\nkeep = [\"/etc/app\", \"/opt/app/*\"]\nremove = [\"/var/lib/app/node\", \"/srv/none\"]\n",
    );
    assert!(!log.contains("look like keys"), "{log}");
    assert!(log.contains("`/srv/none` of `[clean] remove` matches nothing"), "{log}");
    assert!(lab.image("etc/app/site.key").exists() && !lab.image("var/lib/app/node").exists());
    let (lab, log) = bake(
        "[clean]\nremove = [\"/etc/app/s*.key\", \"/etc/app/db.conf\", \"/var/lib/app\", \"/opt/app\"]\n",
    );
    assert!(!log.contains("look like keys"), "{log}");
    for gone in ["etc/app/site.key", "etc/app/db.conf", "var/lib/app", "opt/app"] {
        assert!(!lab.image(gone).exists(), "{gone}");
    }
}

#[test]
fn a_repository_with_keys_is_removed_or_refused() {
    let with = |toml: &str| {
        let lab = PackageLab::new();
        with_systemd(&lab);
        lab.define(&format!("packages = [\"ssl-cert\", \"etckeeper\", \"git\"]\n{toml}"));
        let baked = lab.bake();
        (lab, baked)
    };
    let (lab, baked) = with("");
    let log = baked.log.clone();
    baked.facts();
    assert!(
        log.contains("removed /etc/.git with its history") && log.contains("oven-etckeeper.service"),
        "{log}"
    );
    assert!(!lab.image("etc/.git").exists() && !lab.image("etc/ssl/private/ssl-cert-snakeoil.key").exists());
    let (lab, baked) = with("[clean]\nkeep = [\"/etc/.git\"]\n");
    baked.facts();
    assert!(lab.image("etc/.git/HEAD").exists());
    // Nothing is removed, so the history holds nothing of it.
    let (lab, baked) = with(
        "[clean]\nkeep = [\"/etc\", \"/var/lib\"]\n[[run]]\ncommand = [\"git\", \"clone\", \
         \"-q\", \"--bare\", \"/etc\", \"/srv/etc.git\"]\n",
    );
    baked.facts();
    assert!(lab.image("srv/etc.git/HEAD").exists());
    // The backup has the same history, and nothing begins it again.
    let (_lab, baked) =
        with("[[run]]\ncommand = [\"git\", \"clone\", \"-q\", \"--bare\", \"/etc\", \"/srv/etc.git\"]\n");
    baked.fails(STEP, &["/srv/etc.git: a repository whose history holds", "[clean] remove", "[clean] keep"]);
}
