//! Removes keys that every instance must generate for itself. If nothing in the image generates new keys at the first
//! boot, this module adds a systemd unit that generates them.

use super::rules;
use super::rules::is_excluded;
use crate::image::tree::ImageTree;
use anyhow::{Context, Result};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The directories in which systemd searches for units, the administrator's first.
pub(super) const UNITS: [&str; 3] = ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// The maximum number of enabled units. A usual image has less than 200.
const UNITS_MAX: usize = 10_000;

const SSH_UNIT: &str = "oven-ssh-keys.service";
/// The unit must run before sshd's socket units, because systemd may start sshd at the first connection. Socket units
/// start before basic.target. With default dependencies, this unit would start after basic.target. That would be a
/// dependency cycle, so the unit has no default dependencies.
const SSH_CONTENT: &str = "\
# Added by oven: SSH host keys are not cloned, each instance makes its own.
[Unit]
Description=Make the SSH host keys that are missing
Documentation=man:ssh-keygen(1)
DefaultDependencies=no
RequiresMountsFor=/etc/ssh
After=systemd-remount-fs.service
Before=ssh.service sshd.service ssh.socket sshd.socket shutdown.target
Conflicts=shutdown.target
ConditionPathExists=|!/etc/ssh/ssh_host_rsa_key
ConditionPathExists=|!/etc/ssh/ssh_host_ecdsa_key
ConditionPathExists=|!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
";

const SNAKEOIL_UNIT: &str = "oven-snakeoil.service";
/// Services start after basic.target, so this unit runs before that target.
const SNAKEOIL_CONTENT: &str = "\
# Added by oven: private keys are not cloned, each instance makes its own.
[Unit]
Description=Make the self-signed snakeoil certificate that is missing
Documentation=man:make-ssl-cert(8)
DefaultDependencies=no
After=sysinit.target
Before=basic.target shutdown.target
Conflicts=shutdown.target
ConditionPathExists=!/etc/ssl/private/ssl-cert-snakeoil.key

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/make-ssl-cert generate-default-snakeoil --force-overwrite

[Install]
WantedBy=basic.target
";

pub fn has_systemd(inside: &ImageTree) -> Result<bool> {
    Ok(inside.exists("/usr/lib/systemd/systemd")? || inside.exists("/lib/systemd/systemd")?)
}

/// Removes the SSH host keys. If sshd is installed and nothing in the image generates new keys, this function first
/// adds a unit that generates them. If the unit cannot be added, the keys remain. Returns a note about the added unit.
pub fn replace_host_keys(inside: &ImageTree, keep: &[String]) -> Result<Option<String>> {
    let is_kept = |path: &str| is_excluded(keep, path);
    let keys = inside.expand(rules::HOST_KEYS)?;
    if keys.iter().any(|(path, _)| is_kept(path)) {
        return Ok(None);
    }
    let mut note = None;
    if inside.exists("/usr/sbin/sshd")? && !makes_host_keys(inside)? {
        if !has_systemd(inside)? || !inside.exists("/usr/bin/ssh-keygen")? {
            // Without keys, sshd would not start. So the keys remain, and the lint reports them.
            return Ok(None);
        }
        add_unit(inside, SSH_UNIT, SSH_CONTENT, "multi-user.target")?;
        note = Some(format!("added {SSH_UNIT}, which makes SSH host keys when an instance first boots"));
    }
    inside.remove_matching(rules::HOST_KEYS, &is_kept)?;
    inside.remove_matching("/etc/ssh/ssh_host_*_key.pub", &is_kept)?;
    Ok(note)
}

/// Removes the snakeoil key, and adds a unit that generates a new one. Debian's package ssl-cert generates this key
/// during its installation. Mail and database servers use it. If the unit cannot be added, the key remains. Returns a
/// note about the added unit.
pub fn replace_snakeoil_key(inside: &ImageTree, keep: &[String]) -> Result<Option<String>> {
    let is_kept = |path: &str| is_excluded(keep, path);
    if inside.kind_of(rules::SNAKEOIL)?.is_none() || is_kept(rules::SNAKEOIL) {
        return Ok(None);
    }
    if !has_systemd(inside)? || !inside.exists("/usr/sbin/make-ssl-cert")? {
        return Ok(None);
    }
    add_unit(inside, SNAKEOIL_UNIT, SNAKEOIL_CONTENT, "basic.target")?;
    inside.remove_matching(rules::SNAKEOIL, &is_kept)?;
    inside.remove_matching("/etc/ssl/certs/ssl-cert-snakeoil.pem", &is_kept)?;
    Ok(Some(format!(
        "added {SNAKEOIL_UNIT}, which makes the snakeoil certificate when an instance first boots"
    )))
}

/// Returns whether cloud-init, a unit or an init script generates SSH host keys at boot.
fn makes_host_keys(inside: &ImageTree) -> Result<bool> {
    if cloud_init_makes_them(inside)? {
        return Ok(true);
    }
    if has_systemd(inside)? {
        for name in enabled_units(inside)? {
            // sshd-keygen.target is the unit of Fedora and related distributions.
            if name.starts_with("sshd-keygen") || unit_runs_ssh_keygen(inside, &name)? {
                return Ok(true);
            }
        }
        return Ok(false);
    }
    let mut scripts = inside.expand("/etc/rc*.d/S*")?;
    scripts.extend(inside.expand("/etc/rc.local")?);
    for (path, _) in scripts {
        if runs_ssh_keygen(&inside.read_text(&path)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns whether a line that is not a comment runs `ssh-keygen -A`.
fn runs_ssh_keygen(text: &str) -> bool {
    // Most texts do not contain the word at all. This search is much faster than the one for words.
    if !text.contains("ssh-keygen") {
        return false;
    }
    text.lines().map(str::trim_start).filter(|line| !line.starts_with(['#', ';'])).any(|line| {
        let mut words = line.split_whitespace();
        words.any(|word| word.ends_with("ssh-keygen")) && words.any(|word| word == "-A")
    })
}

fn cloud_init_makes_them(inside: &ImageTree) -> Result<bool> {
    let mut generator = false;
    for dir in ["/usr/lib", "/lib"] {
        generator |= inside.exists(&format!("{dir}/systemd/system-generators/cloud-init-generator"))?;
    }
    let disabled = inside.exists("/etc/cloud/cloud-init.disabled")?
        || is_masked(inside, "cloud-init.target")?
        || is_masked(inside, "cloud-init.service")?;
    let modules = inside.read_text("/etc/cloud/cloud.cfg")?;
    let ssh = modules.lines().any(|line| matches!(line.trim(), "- ssh" | "- \"ssh\"" | "- 'ssh'"));
    Ok(generator && !disabled && ssh && inside.exists("/usr/bin/cloud-init")?)
}

pub(super) fn is_masked(inside: &ImageTree, unit: &str) -> Result<bool> {
    let link = inside.read_link(&format!("{}/{unit}", UNITS[0]))?;
    Ok(link.is_some_and(|target| target == "/dev/null"))
}

/// Returns the units that another unit wants or requires.
fn enabled_units(inside: &ImageTree) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for dir in UNITS {
        for kind in ["wants", "requires"] {
            for (wants, _) in inside.expand(&format!("{dir}/*.{kind}"))? {
                names.extend(inside.list(&wants)?.into_iter().filter_map(|name| name.into_string().ok()));
                if names.len() > UNITS_MAX {
                    let what = format!("more than {UNITS_MAX} units are enabled in the image");
                    return Err(inside.meter().exceeded(what));
                }
            }
        }
    }
    names.sort_unstable();
    names.dedup();
    let mut all = Vec::new();
    for name in names {
        if !is_masked(inside, &name)? {
            all.push(name);
        }
    }
    Ok(all)
}

/// Returns whether a unit, one of its drop-ins, or its template runs `ssh-keygen -A`.
fn unit_runs_ssh_keygen(inside: &ImageTree, name: &str) -> Result<bool> {
    let template =
        name.split_once('@').and_then(|(stem, rest)| Some(format!("{stem}@.{}", rest.rsplit_once('.')?.1)));
    for name in std::iter::once(name).chain(template.as_deref()) {
        for dir in UNITS {
            let mut paths = vec![format!("{dir}/{name}")];
            let drop_ins = inside.expand(&format!("{dir}/{name}.d/*.conf"))?;
            paths.extend(drop_ins.into_iter().map(|(path, _)| path));
            for path in paths {
                if runs_ssh_keygen(&inside.read_text(&path)?) {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// Adds a unit and enables it, as `systemctl enable` does.
pub(super) fn add_unit(inside: &ImageTree, name: &str, content: &str, wanted_by: &str) -> Result<()> {
    let path = format!("{}/{name}", UNITS[0]);
    inside.write(&path, content.as_bytes(), 0o644, 0, 0)?;
    let wants = format!("{}/{wanted_by}.wants", UNITS[0]);
    inside.create_dir_all(&wants, 0o755)?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat2(inside.dir(), &*wants, flags, Mode::empty(), resolve)
        .with_context(|| format!("opening {wants} in the image"))?;
    let (link, mut create) = (format!("{wants}/{name}"), || rustix::fs::symlinkat(&*path, &dir, name));
    match inside.change(&dir, name, &link, &mut create)?.result {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("enabling {name} in the image")),
    }
}

/// Returns the private host keys that are still in the image, for the lint.
pub fn remaining_host_keys(inside: &ImageTree) -> Result<Vec<String>> {
    let keys = inside.expand(rules::HOST_KEYS)?;
    Ok(keys.into_iter().filter(|(_, kind)| *kind == FileType::RegularFile).map(|(path, _)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    fn server() -> Tree {
        let tree = Tree::new();
        for path in
            ["usr/sbin/sshd", "usr/bin/ssh-keygen", "usr/lib/systemd/systemd", "etc/ssh/ssh_host_rsa_key.pub"]
        {
            tree.file(path, "x");
        }
        tree.file("etc/ssh/ssh_host_rsa_key", "PRIVATE");
        tree.file("etc/ssh/sshd_config", "Port 22");
        tree
    }

    fn run(tree: &Tree, keep: &[&str]) -> Option<String> {
        replace_host_keys(&tree.tree(), &keep.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    const LINK: &str = "etc/systemd/system/multi-user.target.wants/oven-ssh-keys.service";

    #[test]
    fn keys_are_removed_and_a_unit_is_added_once() {
        let tree = server();
        assert!(run(&tree, &[]).unwrap().contains(SSH_UNIT));
        assert!(!tree.has("etc/ssh/ssh_host_rsa_key") && !tree.has("etc/ssh/ssh_host_rsa_key.pub"));
        assert!(tree.has("etc/ssh/sshd_config"));
        assert_eq!(tree.link_of(LINK).as_deref(), Some("/etc/systemd/system/oven-ssh-keys.service"));
        let once = tree.listing();
        assert_eq!(run(&tree, &[]), None, "the unit makes them now");
        assert_eq!(tree.listing(), once);
    }

    #[test]
    fn nothing_is_added_where_something_makes_them() {
        for unit in [
            "[Service]\nExecStart=/usr/bin/ssh-keygen -A\n",
            "[Service]\nExecStartPre=-/usr/bin/ssh-keygen  -A\n",
        ] {
            let tree = server();
            tree.file("usr/lib/systemd/system/keys.service", unit);
            tree.link(
                "/usr/lib/systemd/system/keys.service",
                "etc/systemd/system/multi-user.target.wants/keys.service",
            );
            assert_eq!(run(&tree, &[]), None, "{unit}");
            assert!(!tree.has("etc/ssh/ssh_host_rsa_key") && !tree.has(LINK));
        }
        let tree = server();
        tree.file("usr/lib/systemd/system/keys.service", "[Service]\nExecStart=/usr/bin/ssh-keygen -A\n");
        assert!(run(&tree, &[]).is_some(), "a unit that nothing wants makes no keys");
        let tree = server();
        tree.file("usr/lib/systemd/system/keys.service", "[Service]\n#ExecStart=/usr/bin/ssh-keygen -A\n");
        tree.link("../keys.service", "usr/lib/systemd/system/multi-user.target.wants/keys.service");
        assert!(run(&tree, &[]).is_some(), "nor does a comment");
    }

    #[test]
    fn cloud_init_makes_them_unless_it_is_disabled() {
        let with = |also: &[(&str, &str)]| {
            let tree = server();
            tree.file("usr/bin/cloud-init", "x");
            tree.file("usr/lib/systemd/system-generators/cloud-init-generator", "x");
            tree.file("etc/cloud/cloud.cfg", "cloud_init_modules:\n - users_groups\n - ssh\n");
            also.iter().for_each(|(path, content)| tree.file(path, content));
            run(&tree, &[])
        };
        assert_eq!(with(&[]), None);
        assert!(with(&[("etc/cloud/cloud-init.disabled", "")]).is_some());
        assert!(with(&[("etc/cloud/cloud.cfg", "cloud_init_modules:\n - users_groups\n")]).is_some());
    }

    #[test]
    fn keys_stay_if_nothing_can_make_them_or_keep_names_them() {
        let tree = server();
        tree.remove("usr/lib/systemd/systemd");
        assert_eq!(run(&tree, &[]), None);
        assert!(tree.has("etc/ssh/ssh_host_rsa_key"));
        let tree = server();
        assert_eq!(run(&tree, &["/etc/ssh/ssh_host_rsa_key"]), None);
        assert!(tree.has("etc/ssh/ssh_host_rsa_key") && !tree.has(LINK));
    }

    #[test]
    fn without_sshd_keys_are_removed_and_nothing_is_added() {
        let tree = server();
        tree.remove("usr/sbin/sshd");
        assert_eq!(run(&tree, &[]), None);
        assert!(!tree.has("etc/ssh/ssh_host_rsa_key") && !tree.has(LINK));
    }

    #[test]
    fn the_snakeoil_key_is_made_anew_by_each_instance() {
        let tree = server();
        tree.file("usr/sbin/make-ssl-cert", "x");
        tree.file("etc/ssl/private/ssl-cert-snakeoil.key", "PRIVATE");
        tree.file("etc/ssl/certs/ssl-cert-snakeoil.pem", "cert");
        let keep = [rules::SNAKEOIL.to_owned()];
        assert_eq!(replace_snakeoil_key(&tree.tree(), &keep).unwrap(), None);
        assert!(replace_snakeoil_key(&tree.tree(), &[]).unwrap().is_some());
        assert!(
            !tree.has("etc/ssl/private/ssl-cert-snakeoil.key")
                && !tree.has("etc/ssl/certs/ssl-cert-snakeoil.pem")
        );
        assert!(tree.link_of("etc/systemd/system/basic.target.wants/oven-snakeoil.service").is_some());
        assert_eq!(replace_snakeoil_key(&tree.tree(), &[]).unwrap(), None);
    }
}
