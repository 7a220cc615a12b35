//! Removes the identities and secrets that scripts of packages made. A base image may have some, too. They are removed
//! only if something makes new ones at the first boot. If nothing in the image does, oven adds a unit.

mod table;

pub use table::{IDENTITIES, IdentityFile, Maker, PackageIdentity};

use super::first_boot::{UNITS, add_unit, has_systemd, is_masked};
use super::rules::is_excluded;
use crate::image::file_version::FileVersion;
use crate::image::tree::ImageTree;
use anyhow::{Context, Result};
use rustix::fs::{FileType, Stat};
use std::collections::BTreeMap;

/// The result of [`replace()`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReplacedIdentities {
    /// Notes for the user.
    pub notes: Vec<String>,
    /// The files that remain, each with its meaning: nothing makes new ones, or they are from the base image, which may
    /// share them on purpose.
    pub remaining: Vec<(String, String)>,
}

/// The files of the base image with secrets that machines may share on purpose.
#[derive(Debug, Default)]
pub struct BaseSecrets(BTreeMap<&'static str, FileVersion>);

impl BaseSecrets {
    /// Finds the files. Call this before the first step.
    pub fn of(inside: &ImageTree) -> Result<Self> {
        let mut versions = BTreeMap::new();
        for file in IDENTITIES.iter().filter(|identity| identity.may_be_shared).flat_map(|found| found.files)
        {
            if inside.kind_of(file.path)? == Some(FileType::RegularFile) {
                versions.extend(inside.version(file.path)?.map(|version| (file.path, version)));
            }
        }
        Ok(Self(versions))
    }

    /// Returns whether a file is still as in the base image.
    fn has_unchanged(&self, inside: &ImageTree, path: &str) -> Result<bool> {
        let Some(version) = self.0.get(path) else { return Ok(false) };
        Ok(inside.version(path)?.is_some_and(|now| now == *version))
    }
}

/// Which identities are not removed.
pub struct Exemptions<'a> {
    /// The paths of `[clean] keep` and of files that the definition places.
    pub paths: &'a [String],
    /// Returns whether a file is removed even if machines may share it on purpose. A package's script made such a file
    /// in this bake, or `[clean] remove` names it.
    pub is_removed: &'a dyn Fn(&str) -> Result<bool>,
    pub base: &'a BaseSecrets,
}

/// A file that is in the image, and has an identity.
struct FoundFile {
    file: &'static IdentityFile,
    stat: Stat,
}

/// The files of the image that have an identity.
#[derive(Default)]
struct FoundFiles {
    removable: Vec<FoundFile>,
    /// Whether files with the identity are exempt.
    has_exempt: bool,
    /// Files of the base image that machines may share on purpose.
    of_base: Vec<&'static str>,
}

/// Removes the identities, unless they are exempt.
pub fn replace(inside: &ImageTree, exempt: &Exemptions<'_>) -> Result<ReplacedIdentities> {
    let mut replaced = ReplacedIdentities::default();
    for identity in IDENTITIES {
        let FoundFiles { removable: found, has_exempt, of_base } = find(inside, identity, exempt)?;
        let of_base =
            of_base.into_iter().map(|path| (path, format!("{}, from the base image", identity.what)));
        replaced.remaining.extend(of_base.map(|(path, what)| (path.to_owned(), what)));
        if found.is_empty() {
            continue;
        }
        if !is_made_again(inside, identity)? {
            let remaining = found.iter().map(|found| (found.file.path.to_owned(), identity.what.to_owned()));
            replaced.remaining.extend(remaining);
            continue;
        }
        let doing = || format!("removing {}", identity.what);
        if let Maker::Added { before, .. } = identity.maker {
            let unit = format!("{}.service", identity.unit);
            add_unit(inside, &unit, &unit_text(identity, before, &found), "basic.target")
                .with_context(doing)?;
            let what = identity.what;
            replaced.notes.push(format!("added {unit}, which makes {what} when an instance first boots"));
        } else {
            replaced.notes.push(format!("removed {}, which each instance makes itself", identity.what));
        }
        for FoundFile { file, stat } in &found {
            match file.variable {
                Some(variable) => clear_variable(inside, file.path, variable, stat).with_context(doing)?,
                None => _ = inside.remove(file.path).with_context(doing)?,
            }
        }
        for path in identity.public.iter().filter(|_| !has_exempt) {
            inside.remove_matching(path, &|path| is_excluded(exempt.paths, path)).with_context(doing)?;
        }
    }
    Ok(replaced)
}

/// Finds the files of the image that have an identity.
fn find(
    inside: &ImageTree,
    identity: &'static PackageIdentity,
    exempt: &Exemptions<'_>,
) -> Result<FoundFiles> {
    let mut found = FoundFiles::default();
    for file in identity.files {
        if inside.kind_of(file.path)? != Some(FileType::RegularFile) {
            continue;
        }
        let Some(stat) = inside.metadata(file.path)?.filter(|stat| stat.st_size > 0) else { continue };
        let has_identity = match (file.line, file.variable) {
            ("", _) => true,
            (line, variable) => {
                let text = inside.read_text(file.path)?;
                let mut rest = text.lines().filter_map(|text| text.trim_start().strip_prefix(line));
                rest.any(|value| variable.is_none() || !value.trim().trim_matches('"').is_empty())
            }
        };
        if !has_identity {
            continue;
        }
        let is_listed = is_excluded(exempt.paths, file.path);
        if !is_listed && (!identity.may_be_shared || (exempt.is_removed)(file.path)?) {
            found.removable.push(FoundFile { file, stat });
            continue;
        }
        found.has_exempt = true;
        if !is_listed && exempt.base.has_unchanged(inside, file.path)? {
            found.of_base.push(file.path);
        }
    }
    Ok(found)
}

fn is_made_again(inside: &ImageTree, identity: &PackageIdentity) -> Result<bool> {
    match identity.maker {
        Maker::User => Ok(true),
        Maker::Unit(unit) => {
            let mut exists = false;
            for dir in UNITS {
                exists |= inside.exists(&format!("{dir}/{unit}"))?;
            }
            Ok(exists && has_systemd(inside)? && !is_masked(inside, unit)?)
        }
        Maker::Added { programs, .. } => {
            let mut exists = false;
            for program in programs {
                exists |= inside.exists(program)?;
            }
            Ok(exists && has_systemd(inside)?)
        }
    }
}

/// Removes the value of a shell variable from a file.
fn clear_variable(inside: &ImageTree, path: &str, variable: &str, stat: &Stat) -> Result<()> {
    let content = inside.read(path)?.unwrap_or_default();
    let start = format!("{variable}=");
    let mut cleared = Vec::with_capacity(content.len());
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        match line.trim_ascii_start().starts_with(start.as_bytes()) {
            true => cleared.extend_from_slice(format!("{start}\"\"\n").as_bytes()),
            false => cleared.extend_from_slice(line),
        }
    }
    inside.write(path, &cleared, stat.st_mode & 0o7777, stat.st_uid, stat.st_gid)
}

/// The unit runs before basic.target, because other services start after it. Some services of this list start even
/// earlier, so the unit has no default dependencies. Each file gets the owner and the mode that it had. If a command
/// fails, the others still run, and the unit runs again at the next boot.
fn unit_text(identity: &PackageIdentity, before: &str, found: &[FoundFile]) -> String {
    let (mut conditions, mut commands) = (String::new(), String::new());
    for FoundFile { file, stat } in found {
        let (path, mode) = (file.path, stat.st_mode & 0o7777);
        let is_missing = match file.variable {
            Some(variable) => format!("grep -q \"^{variable}=\\\"\\\"\\$\" {path}"),
            None => format!("[ ! -s {path} ]"),
        };
        if file.variable.is_none() {
            conditions += &format!("ConditionFileNotEmpty=|!{path}\n");
        }
        let make = file.command.replace("{file}", path);
        // One command may make several files, so each file gets its owner and mode even if it exists already.
        let script = format!(
            "if {is_missing}; then {make}; fi && chown {}:{} {path} && chmod {mode:04o} {path} && \
             {{ ! command -v restorecon > /dev/null || restorecon {path}; }}",
            stat.st_uid, stat.st_gid
        );
        commands += &format!("ExecStart=-/bin/sh -c '{}'\n", escape_command(&script));
    }
    let what = identity.what;
    let paths: Vec<_> = found.iter().map(|found| found.file.path).collect();
    let paths = paths.join(" ");
    format!(
        "# Added by oven: {what} is not cloned, each instance makes its own.\n\
         [Unit]\n\
         Description=Make {what}\n\
         DefaultDependencies=no\n\
         RequiresMountsFor={paths}\n\
         After=systemd-remount-fs.service\n\
         Before={before} basic.target shutdown.target\n\
         Conflicts=shutdown.target\n\
         {conditions}\n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         UMask=0077\n\
         {commands}\n\
         [Install]\n\
         WantedBy=basic.target\n"
    )
}

/// Escapes a command as a unit's argument in single quotes.
fn escape_command(command: &str) -> String {
    command.replace('\\', "\\\\").replace('\'', "\\'").replace('%', "%%").replace('$', "$$")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    /// An image with all identities, and with everything that makes them again.
    fn image() -> Tree {
        let tree = Tree::new();
        tree.file("usr/lib/systemd/systemd", "elf");
        for identity in IDENTITIES {
            for file in identity.files {
                let content = if file.line.is_empty() {
                    "secret".into()
                } else {
                    format!("# x\n{}\"id\"\ny\n", file.line)
                };
                tree.file(&file.path[1..], &content);
            }
            identity.public.iter().for_each(|path| tree.file(&path[1..], "public"));
            match identity.maker {
                Maker::User => {}
                Maker::Unit(unit) => tree.file(&format!("usr/lib/systemd/system/{unit}"), "[Service]\n"),
                Maker::Added { programs, .. } => tree.file(&programs[0][1..], "elf"),
            }
        }
        tree
    }

    fn replace_all(tree: &Tree) -> ReplacedIdentities {
        replace_except(tree, &[], &|_| Ok(true))
    }

    fn replace_except(
        tree: &Tree,
        paths: &[&str],
        is_removed: &dyn Fn(&str) -> Result<bool>,
    ) -> ReplacedIdentities {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let base = BaseSecrets::default();
        replace(&tree.tree(), &Exemptions { paths: &paths, is_removed, base: &base }).unwrap()
    }

    #[test]
    fn each_identity_is_removed_and_made_again() {
        let tree = image();
        let replaced = replace_all(&tree);
        assert_eq!((replaced.notes.len(), replaced.remaining.len()), (IDENTITIES.len(), 0));
        for identity in IDENTITIES {
            for file in identity.files {
                let left = tree.read(&file.path[1..]);
                let expected = file.variable.map(|variable| format!("# x\n{variable}=\"\"\ny\n"));
                assert_eq!(left, expected, "{}", file.path);
            }
            assert!(identity.public.iter().all(|path| !tree.has(&path[1..])), "{}", identity.what);
            let unit = format!("etc/systemd/system/{}.service", identity.unit);
            let Maker::Added { .. } = identity.maker else {
                assert!(identity.unit.is_empty(), "{}", identity.what);
                continue;
            };
            let text = tree.read(&unit).unwrap();
            for file in identity.files {
                assert!(text.contains(&format!("chmod 0644 {}", file.path)), "{text}");
            }
            assert!(!text.contains("{file}"), "{text}");
            let link = format!("etc/systemd/system/basic.target.wants/{}.service", identity.unit);
            assert_eq!(tree.link_of(&link), Some(format!("/{unit}")));
        }
        let listing = tree.listing();
        assert_eq!(replace_all(&tree), ReplacedIdentities::default());
        assert_eq!(tree.listing(), listing);
    }

    #[test]
    fn identities_that_nothing_makes_remain_and_are_returned() {
        for identity in IDENTITIES {
            let tree = image();
            match identity.maker {
                Maker::User => continue,
                Maker::Unit(unit) => tree.link("/dev/null", &format!("etc/systemd/system/{unit}")),
                Maker::Added { programs, .. } => tree.remove(&programs[0][1..]),
            }
            let replaced = replace_all(&tree);
            for file in identity.files {
                assert!(
                    tree.read(&file.path[1..]).is_some_and(|text| !text.contains("\"\"")),
                    "{}",
                    file.path
                );
                assert!(
                    replaced.remaining.contains(&(file.path.to_owned(), identity.what.to_owned())),
                    "{replaced:?}"
                );
            }
        }
    }

    #[test]
    fn exempt_paths_and_files_without_an_identity_stay() {
        let tree = image();
        // Debian's template of this file: the name is made when the daemon starts.
        tree.file("etc/iscsi/initiatorname.iscsi", "GenerateName=yes\n");
        tree.file("etc/popularity-contest.conf", "MY_HOSTID=\"\"\n");
        tree.file("etc/nvme/hostid", "");
        let exempt = ["/etc/bind", "/etc/dropbear/*", "/etc/xrdp/rsakeys.ini"];
        assert_eq!(replace_except(&tree, &exempt, &|_| Ok(true)).remaining, []);
        for path in ["etc/bind/rndc.key", "etc/dropbear/dropbear_rsa_host_key", "etc/xrdp/rsakeys.ini"] {
            assert_eq!(tree.read(path).as_deref(), Some("secret"), "{path}");
        }
        assert_eq!(tree.read("etc/iscsi/initiatorname.iscsi").as_deref(), Some("GenerateName=yes\n"));
        assert!(!tree.has("etc/nvme/hostnqn") && tree.has("etc/nvme/hostid") && !tree.has("etc/rndc.key"));
        for unit in
            ["oven-iscsi-initiator", "oven-popularity-contest-id", "oven-dropbear-keys", "oven-xrdp-key"]
        {
            assert!(!tree.has(&format!("etc/systemd/system/{unit}.service")), "{unit}");
        }
    }

    #[test]
    fn only_packages_secrets_that_machines_may_share_are_removed() {
        let shared: Vec<_> = IDENTITIES.iter().filter(|identity| identity.may_be_shared).collect();
        assert_eq!(shared.len(), 5);
        let paths: Vec<_> = shared.iter().flat_map(|identity| identity.files).map(|file| file.path).collect();
        // The definition or the base made them.
        let tree = image();
        let base = BaseSecrets::of(&tree.tree()).unwrap();
        tree.file("var/lib/rabbitmq/.erlang.cookie", "the definition's");
        tree.file("etc/unbound/unbound_control.key", "the definition's");
        let none: &dyn Fn(&str) -> Result<bool> = &|_| Ok(false);
        let replaced =
            replace(&tree.tree(), &Exemptions { paths: &[], is_removed: none, base: &base }).unwrap();
        for path in paths.iter().chain(shared.iter().flat_map(|identity| identity.public)) {
            assert!(tree.has(&path[1..]), "{path}");
        }
        let remaining: Vec<_> = replaced.remaining.iter().map(|(path, _)| path.as_str()).collect();
        let definitions = ["/var/lib/rabbitmq/.erlang.cookie", "/etc/unbound/unbound_control.key"];
        let expected: Vec<_> = paths.iter().copied().filter(|path| !definitions.contains(path)).collect();
        assert_eq!(remaining, expected);
        assert!(replaced.remaining.iter().all(|(_, what)| what.ends_with(", from the base image")));
        assert!(
            !tree.has("etc/nvme/hostid") && !tree.has("etc/docker/key.json"),
            "ids of machines are removed"
        );
        for unit in ["oven-rabbitmq-cookie", "oven-unbound-control-keys", "oven-rndc-key"] {
            assert!(!tree.has(&format!("etc/systemd/system/{unit}.service")), "{unit}");
        }
        // What the user accepts is not reported.
        let accepted: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let exempt = Exemptions { paths: &accepted, is_removed: none, base: &base };
        assert_eq!(replace(&tree.tree(), &exempt).unwrap().remaining, []);
    }

    #[test]
    fn public_parts_are_removed_only_with_all_files() {
        let tree = image();
        replace_except(&tree, &["/etc/pki/tls/private"], &|_| Ok(true));
        assert!(
            tree.has("etc/pki/tls/certs/localhost.crt") && !tree.has("etc/pki/dovecot/certs/dovecot.pem")
        );
        let tree = image();
        replace_except(&tree, &[], &|path| Ok(path.starts_with("/etc/unbound/unbound_server")));
        assert!(tree.has("etc/unbound/unbound_control.pem") && !tree.has("etc/unbound/unbound_server.pem"));
        let unit = tree.read("etc/systemd/system/oven-unbound-control-keys.service").unwrap();
        assert!(unit.contains("chmod 0644 /etc/unbound/unbound_server.pem"), "{unit}");
        assert!(!unit.contains("unbound_control."), "{unit}");
    }

    /// Programs that stand in for those that make the files.
    struct Programs(tempfile::TempDir);

    impl Programs {
        fn new() -> Self {
            let programs = Self(tempfile::tempdir().unwrap());
            for (name, script) in [
                ("nvme", "echo nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"),
                ("iscsi-iname", "echo iqn.2016-04.com.open-iscsi:1"),
                ("rndc-confgen", "echo key > \"$3\""),
                (
                    "unbound-control-setup",
                    "for name in server.key server.pem control.key control.pem; do echo key > \"$2/unbound_$name\"; done",
                ),
                ("dropbearkey", "echo $2 > \"$4\""),
                ("xrdp-keygen", "echo $1 > \"$2\""),
            ] {
                programs.add(name, script);
            }
            programs
        }

        fn add(&self, name: &str, script: &str) {
            let path = self.0.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }

        /// Runs the commands of a unit as systemd would. Returns their exit codes and the text of their errors.
        fn run_unit(&self, tree: &Tree, identity: &PackageIdentity) -> (Vec<i32>, String) {
            let text = tree.read(&format!("etc/systemd/system/{}.service", identity.unit)).unwrap();
            let root = tree.tree();
            let root = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root.dir()));
            let root = std::fs::read_link(root).unwrap();
            let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.0.path().display());
            let (mut codes, mut errors) = (Vec::new(), String::new());
            for line in text.lines().filter_map(|line| line.strip_prefix("ExecStart=-/bin/sh -c '")) {
                // What systemd makes of the argument.
                let mut script = line.strip_suffix('\'').unwrap().to_owned();
                for (escaped, plain) in [("$$", "$"), ("%%", "%"), ("\\'", "'"), ("\\\\", "\\")] {
                    script = script.replace(escaped, plain);
                }
                for dir in ["/etc/", "/var/lib/"] {
                    script = script.replace(&format!(" {dir}"), &format!(" {}{dir}", root.display()));
                }
                let mut command = std::process::Command::new("/bin/sh");
                let ran = command.args(["-c", &script]).env("PATH", &path).output().unwrap();
                codes.push(ran.status.code().unwrap());
                errors += &String::from_utf8_lossy(&ran.stderr);
            }
            (codes, errors)
        }
    }

    fn added() -> impl Iterator<Item = &'static PackageIdentity> {
        IDENTITIES.iter().filter(|identity| matches!(identity.maker, Maker::Added { .. }))
    }

    #[test]
    fn a_command_that_fails_is_tried_again_and_stops_no_other() {
        for (program, identity) in [
            ("nvme", "oven-nvme-host-id"),
            ("iscsi-iname", "oven-iscsi-initiator"),
            ("dropbearkey", "oven-dropbear-keys"),
        ] {
            let (tree, programs) = (image(), Programs::new());
            replace_all(&tree);
            let identity = added().find(|found| found.unit == identity).unwrap();
            let unit = tree.read(&format!("etc/systemd/system/{}.service", identity.unit)).unwrap();
            for file in identity.files {
                // systemd runs the unit again while a file is missing or empty.
                assert!(unit.contains(&format!("\nConditionFileNotEmpty=|!{}\n", file.path)), "{unit}");
            }
            let works = std::fs::read_to_string(programs.0.path().join(program)).unwrap();
            // Current versions of Dropbear make no keys for DSS.
            let fails_for =
                if program == "dropbearkey" { "case $2 in dss) exit 1;; esac\n" } else { "exit 1\n" };
            programs.add(program, &format!("{fails_for}{works}"));
            let (codes, _) = programs.run_unit(&tree, identity);
            assert!(codes.len() == identity.files.len() && codes.contains(&1), "{program}: {codes:?}");
            let is_made = |path: &str| tree.read(&path[1..]).is_some_and(|text| !text.trim().is_empty());
            let failed: Vec<_> = identity.files.iter().filter(|file| !is_made(file.path)).collect();
            let expected = if program == "dropbearkey" { 1 } else { identity.files.len() };
            assert_eq!(failed.len(), expected, "{program}");
            programs.add(program, &works);
            let (codes, errors) = programs.run_unit(&tree, identity);
            assert!(codes.iter().all(|code| *code == 0) && errors.is_empty(), "{program}: {errors}");
            assert!(identity.files.iter().all(|file| is_made(file.path)), "{program}");
        }
    }

    #[test]
    fn the_commands_of_the_units_make_the_files() {
        let (tree, programs) = (image(), Programs::new());
        replace_all(&tree);
        for identity in added() {
            let (codes, errors) = programs.run_unit(&tree, identity);
            assert!(codes.iter().all(|code| *code == 0) && errors.is_empty(), "{}: {errors}", identity.unit);
            for file in identity.files {
                let made = tree.read(&file.path[1..]).unwrap();
                assert!(
                    made.len() > 2 && made.contains(file.line) && !made.contains("\"\""),
                    "{}: {made}",
                    file.path
                );
                assert_eq!(tree.mode(&file.path[1..]), 0o644);
            }
        }
        let id = tree.read("etc/nvme/hostid").unwrap();
        assert_eq!(id, "11111111-2222-4333-8444-555555555555\n");
        let popcon = tree.read("etc/popularity-contest.conf").unwrap();
        let value = popcon.lines().nth(1).unwrap().strip_prefix("MY_HOSTID=\"").unwrap();
        assert!(value.len() == 33 && value[..32].bytes().all(|b| b.is_ascii_hexdigit()), "{popcon}");
        assert_eq!(popcon.lines().nth(2), Some("y"));
    }
}
