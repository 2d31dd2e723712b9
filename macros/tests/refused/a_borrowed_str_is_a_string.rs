#[hopline::service]
trait Demo {
    async fn put(&self, text: &str);
}

fn main() {}
