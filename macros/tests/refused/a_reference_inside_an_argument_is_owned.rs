#[hopline::service]
trait Demo {
    async fn put(&self, texts: Vec<Option<&str>>, pair: (u8, &Vec<u8>));
}

fn main() {}
