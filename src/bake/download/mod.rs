//! Downloads the package files that a definition names by URL. oven itself downloads them, on this machine, before the
//! plugin makes its plan. The files are cached by their digest.
//!
//! The file at a URL may change or be malicious. So a file is used only if it has the digest in image.toml.

#[cfg(test)]
mod tests;

use super::Bake;
use crate::config::project::NetworkSettings;
use crate::definition::{Definition, DownloadedFile, PackageRequest};
use crate::error::{Failure, Kind};
use crate::formats::package;
use crate::identity::checksum::hex;
use crate::report::{Report, Step};
use crate::sys::state_files;
use anyhow::{Context, Result};
use rustls::crypto::ring;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy};

/// The directory of downloads, below a site's state directory.
pub const DIR: &str = "downloads";
/// The number of attempts for each URL. The pause after each attempt is twice as long as the one before.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_secs(2);
/// The interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// The time limit for a connection, and for each read.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The maximal size of a package, in bytes. The largest usual packages, with the debug symbols of a kernel, have about
/// 1 GiB.
const MAX_BYTES: u64 = 8 << 30;
const CA_FILE_MAX: u64 = 16 << 20;
/// Files in which Linux distributions store trusted certificates. The first that exists is used. If none of them
/// exists, only the certificates of `ca_file` are trusted.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
const NETWORK: &str =
    "Is the address reachable from here? `[network]` of oven.toml sets `proxy` and `ca_file`.";

/// The reason why a download failed.
enum DownloadError {
    /// The download may succeed if it is retried.
    Temporary(String),
    /// The URL in image.toml is wrong.
    Wrong(String),
    /// This machine does not trust the server.
    Distrusted(String),
}

/// Downloads the packages that a bake's definition names by URL. Returns the definition with the downloaded files.
pub async fn download_packages(bake: &Bake<'_>) -> Result<Definition> {
    let site = bake.site;
    let dir = site.state.join(DIR);
    let dir = std::path::absolute(&dir).with_context(|| format!("looking for {}", dir.display()))?;
    fetch_packages(bake.image, &dir, &site.settings.network, &site.report).await
}

/// Downloads the packages that a definition names by URL, unless `dir` has them already. Returns the definition with
/// the downloaded files.
///
/// # Errors
/// [`Kind::Definition`], with file, line and key, if there is no file at a URL or the file has another digest.
/// [`Kind::Step`] if the network fails.
pub async fn fetch_packages(
    image: &Definition,
    dir: &Path,
    network: &NetworkSettings,
    report: &Report,
) -> Result<Definition> {
    let mut image = image.clone();
    let mut agent = None;
    // The image keeps its own, because errors name their places.
    let mut packages = image.packages.clone();
    for ask in &mut packages {
        let PackageRequest::Url { url, sha256, file } = ask else { continue };
        let path = dir.join(&*sha256).join(file_name(url));
        if let Some(package) = cached(&path, sha256) {
            report.detail(format!("{url} is already downloaded"));
            *file = Some(DownloadedFile { source: path, package });
            continue;
        }
        if agent.is_none() {
            agent = Some(self::agent(network)?);
        }
        let step = report.step("download", format!("downloading {url}"));
        let wanted = WantedFile { url, sha256, path: &path, step: &step };
        let agent = agent.as_ref().context("no HTTP client")?;
        let downloaded = download(&image, agent, &wanted, report).await;
        *file = Some(DownloadedFile { source: path, package: downloaded? });
        step.done();
    }
    image.packages = packages;
    Ok(image)
}

/// Returns the file that was downloaded earlier, if it still has this digest.
fn cached(path: &Path, sha256: &str) -> Option<package::PackageFile> {
    package::read(path).ok().filter(|package| package.sha256 == *sha256)
}

/// The name of the downloaded file. It always ends in `.deb` or `.rpm`, because package managers need this ending.
fn file_name(url: &str) -> String {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    if name.ends_with(".deb") || name.ends_with(".rpm") {
        return name.to_owned();
    }
    let rpm = path.contains("rpm") && !path.contains("deb");
    format!("package.{}", if rpm { "rpm" } else { "deb" })
}

/// A package file to download.
struct WantedFile<'a> {
    url: &'a str,
    sha256: &'a str,
    /// Where the file is stored.
    path: &'a Path,
    /// Shows how much is downloaded.
    step: &'a Step,
}

async fn download(
    image: &Definition,
    agent: &Agent,
    wanted: &WantedFile<'_>,
    report: &Report,
) -> Result<package::PackageFile> {
    let WantedFile { url, sha256, path, step } = *wanted;
    let dir = path.parent().context("the file has no directory")?;
    let definition_error = |what: String| {
        let place = image.place_of_package(Some(url));
        Kind::Definition.failure(format!("{place}: {what}")).at(&place)
    };
    state_files::create_dir(dir)?;
    remove_stale_parts(dir);
    let mut pause = PAUSE;
    for attempt in 1.. {
        // The temporary file is removed when this future is dropped, even if the thread is still writing to it.
        let part = tempfile::Builder::new().prefix(PART).tempfile_in(dir);
        let part = part.with_context(|| format!("creating a file in {}", dir.display()))?;
        let file = part.reopen().context("reopening the temporary file")?;
        let error = match fetch(agent, url, file, step).await? {
            Ok(found) if found != *sha256 => {
                let what = format!("{url} is not the expected file: its sha256 is {found}, not {sha256}");
                return Err(definition_error(what)
                    .hint("If it is the right file, set its sha256 in image.toml.")
                    .into());
            }
            Ok(_) => {
                let package =
                    package::read(part.path()).map_err(|e| definition_error(format!("{url}: {e:#}")))?;
                part.as_file().sync_all().with_context(|| format!("writing {}", path.display()))?;
                part.persist(path).with_context(|| format!("renaming the download to {}", path.display()))?;
                return Ok(package);
            }
            Err(error) => error,
        };
        match error {
            DownloadError::Temporary(what) if attempt < ATTEMPTS => {
                report.warn(format!("downloading {url} failed ({what}); retrying in {} s", pause.as_secs()));
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            DownloadError::Temporary(what) => {
                let failure =
                    Kind::Step.failure(format!("downloading {url} failed {ATTEMPTS} times: {what}"));
                return Err(failure.hint(NETWORK).into());
            }
            DownloadError::Wrong(what) => {
                return Err(definition_error(format!("{url}: {what}"))
                    .hint("Check the address in a browser or with curl.")
                    .into());
            }
            DownloadError::Distrusted(what) => return Err(distrust_failure(url, &what).into()),
        }
    }
    unreachable!("the last attempt returns")
}

fn distrust_failure(url: &str, what: &str) -> Failure {
    let failure = Kind::Step.failure(format!("downloading {url} failed: {what}"));
    failure.hint(
        "This machine trusts the certificates of its package ca-certificates. To trust others, set `ca_file` in `[network]` of \
         oven.toml.",
    )
}

const PART: &str = ".part-";
/// If a partial download is older than this, the process that wrote it was killed.
const PART_AGE: Duration = Duration::from_secs(24 * 3600);

/// Removes partial downloads of killed processes, but not downloads that other processes may be writing.
fn remove_stale_parts(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
        if entry.file_name().to_string_lossy().starts_with(PART) && age.is_some_and(|age| age > PART_AGE) {
            _ = std::fs::remove_file(entry.path()); // another process may have removed it
        }
    }
}

/// Downloads a URL into a file, and returns the file's digest. The download runs in a thread. If this future is
/// dropped, it sets a flag that ends the thread after its current read. Nobody waits for the thread.
async fn fetch(agent: &Agent, url: &str, file: File, step: &Step) -> Result<Result<String, DownloadError>> {
    struct Stop(Arc<AtomicBool>);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, (sender, receiver)) = (Stop(Arc::default()), tokio::sync::oneshot::channel());
    let (agent, url, stopped) = (agent.clone(), url.to_owned(), Arc::clone(&stop.0));
    let received = Arc::<Received>::default();
    let count = Arc::clone(&received);
    std::thread::Builder::new()
        .name("download".into())
        .spawn(move || sender.send(get(&agent, &url, file, &Watch { stopped: &stopped, received: &count })))
        .context("starting a thread for the download")?;
    let (mut receiver, mut ticks) = (receiver, tokio::time::interval(PROGRESS_INTERVAL));
    loop {
        tokio::select! {
            biased;
            fetched = &mut receiver => break fetched.context("waiting for the download")?,
            _ = ticks.tick() => received.report(step),
        }
    }
}

/// How much of a file was received.
#[derive(Default)]
struct Received {
    bytes: AtomicU64,
    /// The size of the file; 0 if the server does not say it.
    all: AtomicU64,
}

impl Received {
    fn report(&self, step: &Step) {
        let all = self.all.load(Ordering::Relaxed);
        step.progress(self.bytes.load(Ordering::Relaxed), Some(all).filter(|all| *all > 0));
    }
}

/// What the thread of a download shares with the future that waits for it.
struct Watch<'a> {
    stopped: &'a AtomicBool,
    received: &'a Received,
}

fn get(agent: &Agent, url: &str, mut file: File, watch: &Watch<'_>) -> Result<Result<String, DownloadError>> {
    let mut response = match agent.get(url).call() {
        Ok(response) => response,
        Err(error) => return Ok(Err(classify(&error))),
    };
    let Watch { stopped, received } = *watch;
    received.all.store(response.body().content_length().unwrap_or(0), Ordering::Relaxed);
    let (mut body, mut hasher, mut total) = (response.body_mut().as_reader(), Sha256::new(), 0);
    let mut buffer = vec![0; 256 << 10];
    while !stopped.load(Ordering::Relaxed) {
        let count = match body.read(&mut buffer) {
            Ok(0) => return Ok(Ok(hex(&hasher.finalize()))),
            Ok(count) => count,
            Err(error) => return Ok(Err(classify(&ureq::Error::from(error)))),
        };
        total += count as u64;
        if total > MAX_BYTES {
            return Ok(Err(DownloadError::Wrong(format!("is larger than {} GiB", MAX_BYTES >> 30))));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).context("writing the download")?;
        received.bytes.store(total, Ordering::Relaxed);
    }
    Ok(Err(DownloadError::Temporary("it was interrupted".into())))
}

fn classify(error: &ureq::Error) -> DownloadError {
    use ureq::Error;
    match error {
        Error::StatusCode(code @ (404 | 410)) => {
            DownloadError::Wrong(format!("there is nothing at this address (HTTP {code})"))
        }
        Error::StatusCode(code @ (401 | 403)) => {
            DownloadError::Wrong(format!("access is denied (HTTP {code})"))
        }
        Error::StatusCode(code @ (408 | 425 | 429 | 500..)) => {
            DownloadError::Temporary(format!("the server answered with HTTP {code}"))
        }
        Error::StatusCode(code) => DownloadError::Wrong(format!("the server answered with HTTP {code}")),
        Error::BadUri(_) | Error::Http(_) => DownloadError::Wrong("it is not a valid address".into()),
        Error::TooManyRedirects | Error::RedirectFailed => {
            DownloadError::Wrong("it redirects too often".into())
        }
        Error::Timeout(_) => DownloadError::Temporary(format!("no data arrived for {} s", TIMEOUT.as_secs())),
        Error::HostNotFound => DownloadError::Temporary("its host was not found".into()),
        Error::ConnectProxyFailed(why) => {
            DownloadError::Temporary(format!("the proxy cannot connect to it: {why}"))
        }
        Error::ConnectionFailed => DownloadError::Temporary("its host refuses connections".into()),
        other => {
            let text = other.to_string();
            let distrusted =
                matches!(other, Error::Tls(_) | Error::Rustls(_)) || text.contains("certificate");
            if distrusted { DownloadError::Distrusted(text) } else { DownloadError::Temporary(text) }
        }
    }
}

fn agent(network: &NetworkSettings) -> Result<Agent> {
    let roots = root_certificates(network)?;
    let tls = TlsConfig::builder().unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()));
    let config = Agent::config_builder()
        .tls_config(tls.root_certs(roots).build())
        // Uses the proxy of oven.toml, like the steps that fetch packages. The proxy in this process's environment is
        // ignored.
        .proxy(proxy(network)?)
        .user_agent(concat!("oven/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .timeout_resolve(Some(TIMEOUT))
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .timeout_per_read(Some(TIMEOUT));
    Ok(config.build().into())
}

/// The proxy of oven.toml. An HTTP proxy always gets a CONNECT request, even for an `http` URL.
fn proxy(network: &NetworkSettings) -> Result<Option<Proxy>> {
    let Some(address) = &network.proxy else { return Ok(None) };
    let wrong = || Kind::Definition.error("oven.toml: `proxy` of [network] is not the address of a proxy");
    let plain = Proxy::new(address).map_err(|_| wrong())?;
    let mut proxy = Proxy::builder(plain.protocol()).host(plain.host()).port(plain.port());
    proxy = plain.username().into_iter().fold(proxy, |proxy, name| proxy.username(name));
    proxy = plain.password().into_iter().fold(proxy, |proxy, secret| proxy.password(secret));
    for host in network.no_proxy.iter().flat_map(|hosts| hosts.split(',')) {
        // As in curl, an exception for a host also applies to the host's subdomains.
        let bare = host.trim().trim_start_matches("*.").trim_start_matches('.');
        proxy = if bare == "*" {
            proxy.no_proxy("*")
        } else {
            proxy.no_proxy(bare).no_proxy(&format!(".{bare}"))
        };
    }
    Ok(Some(proxy.build().map_err(|_| wrong())?))
}

/// This machine's trusted certificates, and the certificates of `ca_file`.
fn root_certificates(network: &NetworkSettings) -> Result<RootCerts> {
    let mut certificates = Vec::new();
    let own = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let bundles = own.into_iter().chain(BUNDLES.map(PathBuf::from));
    if let Some(text) = bundles.filter_map(|path| read(&path).ok()).next() {
        certificates = parse_certificates(&text);
    }
    if let Some(path) = &network.ca_file {
        let wrong =
            |what: String| Kind::Definition.error(format!("oven.toml: `ca_file` {} {what}", path.display()));
        let added =
            parse_certificates(&read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?);
        if added.is_empty() {
            return Err(wrong("contains no PEM certificate".to_owned()));
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

fn parse_certificates(text: &[u8]) -> Vec<Certificate<'static>> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    parse_pem(text).filter_map(certificate).collect()
}
