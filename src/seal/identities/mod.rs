//! Removes the identities and secrets that scripts of packages made. A base image may have some, too. They are removed
//! only if something makes new ones at the first boot. If nothing in the image does, oven adds a unit.

mod table;

pub use table::{IDENTITIES, IdentityFile, Maker, PackageIdentity};

use super::first_boot::{UNITS, add_unit, has_systemd, is_masked};
use super::rules::is_excluded;
use crate::image::tree::ImageTree;
use anyhow::{Context, Result};
use rustix::fs::{FileType, Stat};

/// The result of [`replace()`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReplacedIdentities {
    /// Notes for the user.
    pub notes: Vec<String>,
    /// The files that remain because nothing makes new ones, each with its meaning.
    pub remaining: Vec<(String, &'static str)>,
}

/// A file that is in the image, and has an identity.
struct FoundFile {
    file: &'static IdentityFile,
    stat: Stat,
}

/// Removes the identities, except for the paths in `exempt`.
pub fn replace(inside: &ImageTree, exempt: &[String]) -> Result<ReplacedIdentities> {
    let mut replaced = ReplacedIdentities::default();
    for identity in IDENTITIES {
        let found = find(inside, identity, exempt)?;
        if found.is_empty() {
            continue;
        }
        if !is_made_again(inside, identity)? {
            replaced.remaining.extend(found.iter().map(|found| (found.file.path.to_owned(), identity.what)));
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
        for path in identity.public {
            inside.remove_matching(path, &|path| is_excluded(exempt, path)).with_context(doing)?;
        }
    }
    Ok(replaced)
}

/// Returns the files of the image that have an identity, except for the paths in `exempt`.
fn find(inside: &ImageTree, identity: &'static PackageIdentity, exempt: &[String]) -> Result<Vec<FoundFile>> {
    let mut found = Vec::new();
    for file in identity.files {
        if is_excluded(exempt, file.path) || inside.kind_of(file.path)? != Some(FileType::RegularFile) {
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
        if has_identity {
            found.push(FoundFile { file, stat });
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
/// earlier, so the unit has no default dependencies. Each file gets the owner and the mode that it had.
fn unit_text(identity: &PackageIdentity, before: &str, found: &[FoundFile]) -> String {
    let (mut conditions, mut commands) = (String::new(), String::new());
    for FoundFile { file, stat } in found {
        let (path, mode) = (file.path, stat.st_mode & 0o7777);
        let is_missing = match file.variable {
            Some(variable) => format!("grep -q \"^{variable}=\\\"\\\"\\$\" {path}"),
            None => format!("[ ! -s {path} ]"),
        };
        if file.variable.is_none() {
            conditions += &format!("ConditionPathExists=|!{path}\n");
        }
        let make = file.command.replace("{file}", path);
        // One command may make several files, so each file gets its owner and mode even if it exists already.
        let script = format!(
            "if {is_missing}; then {make}; fi && chown {}:{} {path} && chmod {mode:04o} {path} && \
             {{ ! command -v restorecon > /dev/null || restorecon {path}; }}",
            stat.st_uid, stat.st_gid
        );
        commands += &format!("ExecStart=/bin/sh -c '{}'\n", escape_command(&script));
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

    fn keep(paths: &[&str]) -> Vec<String> {
        paths.iter().map(|path| (*path).to_owned()).collect()
    }

    #[test]
    fn each_identity_is_removed_and_made_again() {
        let tree = image();
        let replaced = replace(&tree.tree(), &[]).unwrap();
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
        assert_eq!(replace(&tree.tree(), &[]).unwrap(), ReplacedIdentities::default());
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
            let replaced = replace(&tree.tree(), &[]).unwrap();
            for file in identity.files {
                assert!(
                    tree.read(&file.path[1..]).is_some_and(|text| !text.contains("\"\"")),
                    "{}",
                    file.path
                );
                assert!(replaced.remaining.contains(&(file.path.to_owned(), identity.what)), "{replaced:?}");
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
        let exempt = keep(&["/etc/bind", "/etc/dropbear/*", "/etc/xrdp/rsakeys.ini"]);
        replace(&tree.tree(), &exempt).unwrap();
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

    /// Runs the commands of the units as systemd would, with programs that stand in for the real ones.
    #[test]
    fn the_commands_of_the_units_make_the_files() {
        use std::process::Command;
        let tree = image();
        replace(&tree.tree(), &[]).unwrap();
        let root = tree.tree();
        let root =
            std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root.dir())))
                .unwrap();
        let root = root.to_str().unwrap();
        let bin = tempfile::tempdir().unwrap();
        for (name, script) in [
            ("nvme", "echo nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"),
            ("iscsi-iname", "echo iqn.2016-04.com.open-iscsi:1"),
            ("rndc-confgen", "echo key > \"$3\""),
            (
                "unbound-control-setup",
                "echo key > \"$2/unbound_server.key\"; echo key > \"$2/unbound_control.key\"",
            ),
            ("dropbearkey", "echo $2 > \"$4\""),
            ("xrdp-keygen", "echo $1 > \"$2\""),
        ] {
            let path = bin.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.path().display());
        for identity in IDENTITIES {
            let Some(text) = tree.read(&format!("etc/systemd/system/{}.service", identity.unit)) else {
                continue;
            };
            for line in text.lines().filter_map(|line| line.strip_prefix("ExecStart=/bin/sh -c '")) {
                // What systemd makes of the argument.
                let script = line.strip_suffix('\'').unwrap();
                let script =
                    script.replace("$$", "$").replace("%%", "%").replace("\\'", "'").replace("\\\\", "\\");
                let mut in_tree = script;
                for dir in [" /etc/", " /var/lib/"] {
                    in_tree = in_tree.replace(dir, &format!(" {root}{}", &dir[1..]));
                }
                let ran = Command::new("/bin/sh").args(["-c", &in_tree]).env("PATH", &path).output().unwrap();
                assert!(ran.status.success() && ran.stderr.is_empty(), "{in_tree}: {ran:?}");
            }
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
