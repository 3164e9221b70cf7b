//! Certificates for both hosts, under the names by which a monitor reads them.
use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::lab::hosts::Side;

/// Makes an authority, and a directory whose certificates either host can use: they are for the
/// addresses of both, and for this host's own.
///
/// # Errors
/// The directory cannot be written.
pub fn write(directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    fs::write(directory.join("ca-cert.pem"), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for role in ["server", "client"] {
        let hosts = [Side::Left, Side::Right].map(|side| side.address().to_string());
        let names = [&hosts[..], &["localhost".to_owned(), "127.0.0.1".to_owned()]].concat();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, format!("a host as {role}"));
        let key = KeyPair::generate()?;
        fs::write(
            directory.join(format!("{role}-cert.pem")),
            params.signed_by(&key, &issuer)?.pem(),
        )?;
        fs::write(directory.join(format!("{role}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}
