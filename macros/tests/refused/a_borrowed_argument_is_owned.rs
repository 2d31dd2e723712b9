#[hopline::service]
trait Demo {
    async fn put(&self, key: &Key);
    async fn set(&self, key: &mut Vec<u8>);
    async fn open(&self, path: &Path);
}

fn main() {}
