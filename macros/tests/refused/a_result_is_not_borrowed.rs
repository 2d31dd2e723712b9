#[hopline::service]
trait Demo {
    async fn put(&self) -> &str;
    async fn get(&self) -> Option<&'static [u8]>;
}

fn main() {}
