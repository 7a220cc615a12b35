//! The packages of these tests. Each package has one special property. rpmbuild builds them once, and they are in two
//! repositories: one without and one with signatures.

use crate::programs::cache_dir;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The name, version, and architecture of each package, and the rest of its spec. `@` stands for the description.
const PACKAGES: &[(&str, &str, &str, &str)] = &[
    // Provides what Debian's own packages provide: the shell that scripts need, and the release.
    (
        "platform",
        "9",
        "noarch",
        "Provides: /bin/sh\nProvides: system-release\nProvides: system-release(releasever) = 9\n@",
    ),
    ("lib", "1.0", "noarch", "@"),
    ("lib", "1.1", "noarch", "@"),
    ("epochal", "2.0", "noarch", "Epoch: 3\n@"),
    ("weak", "1.0", "noarch", "@"),
    ("site", "1.0", "noarch", "Requires: lib\nRecommends: weak\n@"),
    ("foreign", "1.0", "OTHER", "@"),
    // A replacement for Ansible, with a dependency.
    ("ansible-core", "1.0", "noarch", ANSIBLE),
    ("pyth", "1.0", "noarch", "Epoch: 1\nRequires: lib\n@"),
    ("app", "1.0", "noarch", "Requires: pyth\n@"),
    ("orphan", "1.0", "noarch", "Requires: nowhere >= 3\n@"),
    ("badpost", "1.0", "noarch", "@%post\necho said before\nexit 3\n"),
    ("badpre", "1.0", "noarch", "@%pre\nexit 4\n"),
    (
        "scripted",
        "1.0",
        "noarch",
        "@%post\nmkdir -p /var/lib/scripted\n\
         cat /proc/net/dev > /var/lib/scripted/net\necho \"$SYSTEMD_OFFLINE\" > /var/lib/scripted/offline\n\
         ls -d /run/systemd/system > /var/lib/scripted/booted 2>&1 || :\n\
         touch /var/lib/scripted/file\n",
    ),
    ("conf", "1.0", "noarch", CONF),
    ("conf", "1.1", "noarch", CONF),
    ("blunt", "1.0", "noarch", BLUNT),
    ("blunt", "1.1", "noarch", BLUNT),
    (
        "huge",
        "1.0",
        "noarch",
        "%install\nmkdir -p %{buildroot}/srv\ndd if=/dev/zero of=%{buildroot}/srv/huge bs=1M count=300 status=none\n@/srv/huge\n",
    ),
];
/// A configuration file that is not replaced if it was changed.
const CONF: &str = "%install\nmkdir -p %{buildroot}/etc\necho of %{version} > %{buildroot}/etc/conf.conf\n@%config(noreplace) /etc/conf.conf\n";
/// A configuration file that is replaced even if it was changed.
const BLUNT: &str = "%install\nmkdir -p %{buildroot}/etc\necho of %{version} > %{buildroot}/etc/blunt.conf\n@%config /etc/blunt.conf\n";
/// The playbooks of this Ansible are shell scripts.
const ANSIBLE: &str = "Requires: pyth\nRecommends: weak\n%install\nmkdir -p %{buildroot}/usr/bin\n\
    printf '#!/bin/sh -e\\nfor file; do :; done\\n. $file\\n' > %{buildroot}/usr/bin/ansible-playbook\n\
    chmod 755 %{buildroot}/usr/bin/ansible-playbook\n@/usr/bin/ansible-playbook\n";

const COMPS: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<comps><group><id>web</id><name>Web Server</name>\
    <description>x</description><default>false</default><uservisible>true</uservisible><packagelist>\
    <packagereq type=\"mandatory\">site</packagereq></packagelist></group></comps>\n";

/// Returns the directory with the packages. `plain/` and `signed/` are repositories, and `right.asc` and `wrong.asc`
/// are keys. The packages in `signed/` are signed with the right key.
pub fn built() -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let _turn = MAKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // The directory's name depends on the content, so that a changed package is built again.
    let digest = PACKAGES.iter().flat_map(|(n, v, a, s)| [n, v, a, s]).flat_map(|text| text.bytes());
    let digest = digest
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let dir = cache_dir().join(format!("rpms-{digest:016x}"));
    if dir.exists() {
        return dir;
    }
    let part = dir.with_extension("part");
    _ = Command::new("rm").args(["-rf", "--one-file-system"]).arg(&part).status();
    for name in ["specs", "plain", "signed", "gnupg"] {
        fs::create_dir_all(part.join(name)).unwrap();
    }
    build(&part);
    fs::write(part.join("comps.xml"), COMPS).unwrap();
    sign(&part);
    run(Command::new("createrepo_c").args(["-q", "-g"]).arg(part.join("comps.xml")).arg(part.join("plain")));
    run(Command::new("createrepo_c").arg("-q").arg(part.join("signed")));
    fs::rename(&part, &dir).unwrap();
    dir
}

/// Returns the path of a package file that a definition may list.
pub fn file(name: &str, version: &str, architecture: &str) -> PathBuf {
    built().join("plain").join(format!("{name}-{version}-1.{architecture}.rpm"))
}

/// Returns an architecture other than this machine's.
pub fn foreign() -> &'static str {
    if cfg!(target_arch = "x86_64") { "aarch64" } else { "x86_64" }
}

fn build(part: &Path) {
    for (name, version, architecture, more) in PACKAGES {
        let architecture = if *architecture == "OTHER" { foreign() } else { architecture };
        // The part before the description, and the part after it (files and scripts).
        let (before, after) = more.split_once('@').unwrap();
        let (files, scripts) =
            after.split_once("%p").map_or((after, String::new()), |(f, s)| (f, format!("%p{s}")));
        let (tags, install) = before
            .split_once("%install")
            .map_or((before, String::new()), |(t, i)| (t, format!("%install{i}")));
        let spec = format!(
            "Name: {name}\nVersion: {version}\nRelease: 1\nSummary: a test\nLicense: none\n{tags}\n%description\n\
             A test.\n{install}\n{scripts}\n%files\n{files}"
        );
        let path = part.join("specs").join(format!("{name}-{version}.spec"));
        fs::write(&path, spec).unwrap();
        run(Command::new("rpmbuild")
            .args(["--quiet", "-bb", "--target", architecture])
            .args(["--define", &format!("_topdir {}/build", part.display())])
            .args(["--define", &format!("_rpmdir {}/plain", part.display())])
            .args(["--define", "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm"])
            .arg(&path));
    }
}

fn sign(part: &Path) {
    let home = part.join("gnupg");
    let gpg = || {
        let mut gpg = Command::new("gpg");
        gpg.arg("--homedir").arg(&home).args([
            "--batch",
            "--quiet",
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
        ]);
        gpg
    };
    for name in ["right", "wrong"] {
        run(gpg().args([
            "--quick-generate-key",
            &format!("{name} <{name}@example.org>"),
            "rsa2048",
            "sign",
            "never",
        ]));
        run(gpg()
            .args(["--armor", "--output"])
            .arg(part.join(format!("{name}.asc")))
            .args(["--export", name]));
    }
    for name in ["platform-9", "lib-1.0", "lib-1.1"] {
        let rpm = format!("{name}-1.noarch.rpm");
        fs::copy(part.join("plain").join(&rpm), part.join("signed").join(&rpm)).unwrap();
        run(Command::new("rpmsign")
            .args(["--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name right@example.org"])
            .args(["--define", &format!("_gpg_path {}", home.display()), "--addsign"])
            .arg(part.join("signed").join(&rpm)));
    }
    // gpg started an agent, which would otherwise outlive the test.
    run(Command::new("gpgconf").arg("--homedir").arg(&home).args(["--kill", "gpg-agent"]));
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: run scripts/setup"));
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
}
