//! Certificates and keys in a directory, under the names that Cloud Hypervisor gives them. Reading
//! them is for a thread that may open files.
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
    version::TLS13,
};

/// The certificate that has to have signed the peer's.
const CA: &str = "ca-cert.pem";
/// Longest file, in bytes.
const LONGEST: u64 = 1 << 20;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum CertificateError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is longer than {LONGEST} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{} has no certificate in PEM form", .0.display())]
    NoCertificate(PathBuf),
    #[error("{} has no private key in PEM form", .0.display())]
    NoKey(PathBuf),
    #[error("the certificates in {} cannot be used", directory.display())]
    Use { directory: PathBuf, source: rustls::Error },
    #[error("{} cannot be used to verify the peer's certificate", path.display())]
    Verify { path: PathBuf, source: VerifierBuilderError },
}

/// For the side that opens connections: `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
///
/// # Errors
/// When one of them cannot be read or used.
pub fn client(directory: &Path) -> Result<Arc<ClientConfig>, CertificateError> {
    let refused = |source| CertificateError::Use { directory: directory.into(), source };
    let (chain, key) = own(directory, "client")?;
    let config = ClientConfig::builder_with_provider(provider());
    let config = config.with_protocol_versions(&[&TLS13]).map_err(refused)?;
    let config = config.with_root_certificates(roots(directory)?);
    let mut config = config.with_client_auth_cert(chain, key).map_err(refused)?;
    // Each connection proves both sides again.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// For the side that accepts connections: `ca-cert.pem`, `server-cert.pem` and `server-key.pem`. A
/// client without a certificate is refused.
///
/// # Errors
/// When one of them cannot be read or used.
pub fn server(directory: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let refused = |source| CertificateError::Use { directory: directory.into(), source };
    let (chain, key) = own(directory, "server")?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(directory)?, provider());
    let verifier = verifier
        .build()
        .map_err(|source| CertificateError::Verify { path: directory.join(CA), source })?;
    let config = ServerConfig::builder_with_provider(provider());
    let config = config.with_protocol_versions(&[&TLS13]).map_err(refused)?;
    let config = config.with_client_cert_verifier(verifier);
    let mut config = config.with_single_cert(chain, key).map_err(refused)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn roots(directory: &Path) -> Result<Arc<RootCertStore>, CertificateError> {
    let path = directory.join(CA);
    let mut roots = RootCertStore::empty();
    for certificate in chain(&path)? {
        roots
            .add(certificate)
            .map_err(|source| CertificateError::Use { directory: directory.into(), source })?;
    }
    Ok(Arc::new(roots))
}

/// One's own certificate, with those that lead to the CA's, and its key.
fn own(
    directory: &Path,
    role: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CertificateError> {
    let key = directory.join(format!("{role}-key.pem"));
    let chain = chain(&directory.join(format!("{role}-cert.pem")))?;
    let parsed = PrivateKeyDer::from_pem_slice(&read(&key)?);
    Ok((chain, parsed.map_err(|_| CertificateError::NoKey(key))?))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let bytes = read(path)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    chain.ok_or_else(|| CertificateError::NoCertificate(path.into()))
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes));
    match read {
        Ok(length) if length as u64 > LONGEST => Err(CertificateError::TooLong(path.into())),
        Ok(_) => Ok(bytes),
        Err(source) => Err(CertificateError::Read { path: path.into(), source }),
    }
}
