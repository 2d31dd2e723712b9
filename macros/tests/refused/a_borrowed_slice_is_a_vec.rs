#[hopline::service]
trait Demo {
    async fn put(&self, bytes: &[u8]);
    async fn all(&self, lines: &[&str]);
}

fn main() {}
