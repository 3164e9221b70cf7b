//! Certificates for tests.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test's own mistakes end it")]
use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// What signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// One that nobody knows.
    pub fn generate() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A directory with a certificate for each role, signed by this, which trusts `trusted`.
    pub fn directory(&self, trusted: &Self) -> TempDir {
        let directory = TempDir::new().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text);
        write("ca-cert.pem", &trusted.pem).unwrap();
        for role in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(DnType::CommonName, format!("the {role}"));
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            write(&format!("{role}-cert.pem"), &certificate.pem()).unwrap();
            write(&format!("{role}-key.pem"), &key.serialize_pem()).unwrap();
        }
        directory
    }
}
