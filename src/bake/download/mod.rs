//! Package files by URL: downloaded on this machine before an image is planned, and kept by their digest.
//!
//! What answers at an address may change, or lie: only a file with the digest that image.toml tells is ever used.

#[cfg(test)]
mod tests;

use super::Bake;
use crate::config::project::NetworkSettings;
use crate::definition::{Ask, Definition, Downloaded};
use crate::error::{Failure, Kind};
use crate::formats::package;
use crate::identity::checksum::hex;
use crate::report::Report;
use anyhow::{Context, Result};
use rustls::crypto::ring;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy};

/// Below a site's state directory.
pub const DIR: &str = "downloads";
/// How often an address is asked, with a pause that doubles in between.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_secs(2);
/// For a connection, and for each piece of what comes.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Kernels with their debug symbols have 1 GiB.
const MAX_BYTES: u64 = 8 << 30;
const CA_FILE_MAX: u64 = 16 << 20;
/// Where Linux distributions keep the certificates that they trust; without one, Mozilla's count.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
const NETWORK: &str =
    "Is the address reachable from here? `[network]` of oven.toml holds `proxy` and `ca_file`.";

/// Why a download did not work.
enum Trouble {
    /// It may the next time.
    Passing(String),
    /// What image.toml says is wrong.
    Wrong(String),
    /// This machine does not trust the other.
    Distrusted(String),
}

/// The definition of a bake, with its packages by URL downloaded.
pub async fn packages(bake: &Bake<'_>) -> Result<Definition> {
    let site = bake.site;
    let dir = site.state.join(DIR);
    let dir = std::path::absolute(&dir).with_context(|| format!("looking for {}", dir.display()))?;
    fetch_packages(bake.image, &dir, &site.settings.network, &site.report).await
}

/// The definition with all its packages by URL downloaded, as far as `dir` does not have them.
///
/// # Errors
/// [`Kind::Definition`] with file, line and key where there is nothing at an address, or another file; [`Kind::Step`]
/// where the network fails.
pub async fn fetch_packages(
    image: &Definition,
    dir: &Path,
    network: &NetworkSettings,
    report: &Report,
) -> Result<Definition> {
    let mut image = image.clone();
    let mut agent = None;
    let mut packages = std::mem::take(&mut image.packages);
    for ask in &mut packages {
        let Ask::Url { url, sha256, file } = ask else { continue };
        let path = dir.join(&*sha256).join(file_name(url));
        if let Some(package) = kept(&path, sha256) {
            report.detail(format!("{url} was downloaded before"));
            *file = Some(Downloaded { source: path, package });
            continue;
        }
        if agent.is_none() {
            agent = Some(self::agent(network)?);
        }
        let step = report.step("download", format!("downloading {url}"));
        let got = download(&image, agent.as_ref().context("no agent")?, url, sha256, &path, report).await;
        *file = Some(Downloaded { source: path, package: got? });
        step.done();
    }
    image.packages = packages;
    Ok(image)
}

/// A file that was downloaded earlier, if it is still what it was.
fn kept(path: &Path, sha256: &str) -> Option<package::Package> {
    package::open(path).ok().filter(|package| package.sha256 == *sha256)
}

/// What a plugin and its package manager tell the kind by.
fn file_name(url: &str) -> String {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    if name.ends_with(".deb") || name.ends_with(".rpm") {
        return name.to_owned();
    }
    let rpm = path.contains("rpm") && !path.contains("deb");
    format!("package.{}", if rpm { "rpm" } else { "deb" })
}

async fn download(
    image: &Definition,
    agent: &Agent,
    url: &str,
    sha256: &str,
    path: &Path,
    report: &Report,
) -> Result<package::Package> {
    let dir = path.parent().context("a file without a directory")?;
    let wrong =
        |what: String| Kind::Definition.failure(format!("{}: {what}", image.place("packages", Some(url))));
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    clear(dir);
    let mut pause = PAUSE;
    for attempt in 1.. {
        // Gone with this future, whoever is still writing.
        let part = tempfile::Builder::new().prefix(PART).tempfile_in(dir);
        let part = part.with_context(|| format!("making a file in {}", dir.display()))?;
        let trouble = match fetch(agent, url, part.reopen().context("opening it again")?).await? {
            Ok(found) if found != *sha256 => {
                let what = format!("{url} is another file: its sha256 is {found}, and not {sha256}");
                return Err(wrong(what)
                    .hint("Is it the version that you mean? If so, write down its sha256.")
                    .into());
            }
            Ok(_) => {
                let package = package::open(part.path()).map_err(|e| wrong(format!("{url}: {e:#}")))?;
                part.as_file().sync_all().with_context(|| format!("writing {}", path.display()))?;
                part.persist(path).with_context(|| format!("renaming it to {}", path.display()))?;
                return Ok(package);
            }
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Passing(what) if attempt < ATTEMPTS => {
                report.warn(format!("downloading {url} failed ({what}): once more in {} s", pause.as_secs()));
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            Trouble::Passing(what) => {
                let failure =
                    Kind::Step.failure(format!("downloading {url} failed {ATTEMPTS} times: {what}"));
                return Err(failure.hint(NETWORK).into());
            }
            Trouble::Wrong(what) => {
                return Err(wrong(format!("{url}: {what}"))
                    .hint("Open the address in a browser, or with curl.")
                    .into());
            }
            Trouble::Distrusted(what) => return Err(distrusted(url, &what).into()),
        }
    }
    unreachable!("the last attempt returns")
}

fn distrusted(url: &str, what: &str) -> Failure {
    let failure = Kind::Step.failure(format!("downloading {url} failed: {what}"));
    failure.hint(
        "Certificates to trust beside this machine's own (of its package ca-certificates): `ca_file` in `[network]` of \
         oven.toml.",
    )
}

const PART: &str = ".part-";
/// A download that is older was ended by force.
const PART_AGE: Duration = Duration::from_secs(24 * 3600);

/// Removes what killed processes left; others may be writing just now.
fn clear(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
        if entry.file_name().to_string_lossy().starts_with(PART) && age.is_some_and(|age| age > PART_AGE) {
            _ = std::fs::remove_file(entry.path()); // another oven may have done so
        }
    }
}

/// Writes what is at an address into a file, and answers with its digest. In a thread that nobody waits for once this
/// future is dropped: it ends with the process, or when it sees that nobody listens.
async fn fetch(agent: &Agent, url: &str, file: File) -> Result<Result<String, Trouble>> {
    struct Stop(Arc<AtomicBool>);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, (answer, answered)) = (Stop(Arc::default()), tokio::sync::oneshot::channel());
    let (agent, url, stopped) = (agent.clone(), url.to_owned(), Arc::clone(&stop.0));
    std::thread::Builder::new()
        .name("download".into())
        .spawn(move || answer.send(get(&agent, &url, file, &stopped)))
        .context("starting a thread")?;
    answered.await.context("waiting for the download")?
}

fn get(agent: &Agent, url: &str, mut file: File, stopped: &AtomicBool) -> Result<Result<String, Trouble>> {
    let mut response = match agent.get(url).call() {
        Ok(response) => response,
        Err(error) => return Ok(Err(trouble(&error))),
    };
    let (mut body, mut hasher, mut total) = (response.body_mut().as_reader(), Sha256::new(), 0);
    let mut buffer = vec![0; 256 << 10];
    while !stopped.load(Ordering::Relaxed) {
        let count = match body.read(&mut buffer) {
            Ok(0) => return Ok(Ok(hex(&hasher.finalize()))),
            Ok(count) => count,
            Err(error) => return Ok(Err(trouble(&ureq::Error::from(error)))),
        };
        total += count as u64;
        if total > MAX_BYTES {
            return Ok(Err(Trouble::Wrong(format!("is larger than {} GiB", MAX_BYTES >> 30))));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).context("writing what was downloaded")?;
    }
    Ok(Err(Trouble::Passing("it was stopped".into())))
}

fn trouble(error: &ureq::Error) -> Trouble {
    use ureq::Error;
    match error {
        Error::StatusCode(code @ (404 | 410)) => {
            Trouble::Wrong(format!("there is nothing at this address (HTTP {code})"))
        }
        Error::StatusCode(code @ (401 | 403)) => {
            Trouble::Wrong(format!("it is not for everybody (HTTP {code})"))
        }
        Error::StatusCode(code @ (408 | 425 | 429 | 500..)) => {
            Trouble::Passing(format!("the server answered with HTTP {code}"))
        }
        Error::StatusCode(code) => Trouble::Wrong(format!("the server answered with HTTP {code}")),
        Error::BadUri(_) | Error::Http(_) => Trouble::Wrong("it is no address".into()),
        Error::TooManyRedirects | Error::RedirectFailed => {
            Trouble::Wrong("it leads from one address to the next".into())
        }
        Error::Timeout(_) => Trouble::Passing(format!("nothing came for {} s", TIMEOUT.as_secs())),
        Error::HostNotFound => Trouble::Passing("its host is not found".into()),
        Error::ConnectProxyFailed(why) => {
            Trouble::Passing(format!("the proxy does not connect to it: {why}"))
        }
        Error::ConnectionFailed => Trouble::Passing("its host takes no connection".into()),
        other => {
            let text = other.to_string();
            let distrusted =
                matches!(other, Error::Tls(_) | Error::Rustls(_)) || text.contains("certificate");
            if distrusted { Trouble::Distrusted(text) } else { Trouble::Passing(text) }
        }
    }
}

fn agent(network: &NetworkSettings) -> Result<Agent> {
    let roots = roots(network)?;
    let tls = TlsConfig::builder().unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()));
    let config = Agent::config_builder()
        .tls_config(tls.root_certs(roots).build())
        // What oven.toml says, as for steps that fetch: not what this process's environment happens to be.
        .proxy(proxy(network)?)
        .user_agent(concat!("oven/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .timeout_resolve(Some(TIMEOUT))
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .timeout_per_read(Some(TIMEOUT));
    Ok(config.build().into())
}

/// An HTTP proxy is asked to CONNECT, whatever the address.
fn proxy(network: &NetworkSettings) -> Result<Option<Proxy>> {
    let Some(spelt) = &network.proxy else { return Ok(None) };
    let wrong = || Kind::Definition.error("oven.toml: `proxy` of [network] is no address of a proxy");
    let plain = Proxy::new(spelt).map_err(|_| wrong())?;
    let mut proxy = Proxy::builder(plain.protocol()).host(plain.host()).port(plain.port());
    proxy = plain.username().into_iter().fold(proxy, |proxy, name| proxy.username(name));
    proxy = plain.password().into_iter().fold(proxy, |proxy, secret| proxy.password(secret));
    for host in network.no_proxy.iter().flat_map(|hosts| hosts.split(',')) {
        // As curl has it: a name means what is below it, too.
        let bare = host.trim().trim_start_matches("*.").trim_start_matches('.');
        proxy = if bare == "*" {
            proxy.no_proxy("*")
        } else {
            proxy.no_proxy(bare).no_proxy(&format!(".{bare}"))
        };
    }
    Ok(Some(proxy.build().map_err(|_| wrong())?))
}

/// This machine's certificates, and those of `ca_file`.
fn roots(network: &NetworkSettings) -> Result<RootCerts> {
    let mut certificates = Vec::new();
    let own = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let bundles = own.into_iter().chain(BUNDLES.map(PathBuf::from));
    if let Some(text) = bundles.filter_map(|path| read(&path).ok()).next() {
        certificates = parse(&text);
    }
    if let Some(path) = &network.ca_file {
        let wrong =
            |what: String| Kind::Definition.error(format!("oven.toml: `ca_file` {} {what}", path.display()));
        let added = parse(&read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?);
        if added.is_empty() {
            return Err(wrong("holds no certificate in PEM".to_owned()));
        }
        certificates.extend(added);
    }
    Ok(RootCerts::from(certificates))
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(CA_FILE_MAX).read_to_end(&mut text)?;
    Ok(text)
}

fn parse(text: &[u8]) -> Vec<Certificate<'static>> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    parse_pem(text).filter_map(certificate).collect()
}
